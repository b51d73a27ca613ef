# syntax=docker/dockerfile:1.7
# One image for every machine: `docker build .` for CPU, `--build-arg DEVICE=cuda` for NVIDIA (torch's wheels bring CUDA;
# the host brings the driver). EXTRAS="cluster otel" adds Ray and traces; APT_PACKAGES=g++
# adds the compiler that `--compile` needs.
ARG PYTHON=python:3.11.14-slim-bookworm

# The dependencies alone: this layer, the big one, changes only with pyproject.toml.
FROM ${PYTHON} AS dependencies
ARG DEVICE=cpu
ARG EXTRAS=""
WORKDIR /src
COPY pyproject.toml ./
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN python -m venv /opt/slipstream && \
    python -c "import sys, tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        print(*p['dependencies'], *(d for e in sys.argv[1:] for d in p['optional-dependencies'][e]), sep='\n')" \
        ${EXTRAS} > requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    case "${DEVICE}" in \
        cpu) export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ;; \
        cuda) ;; \
        *) echo "DEVICE is cpu or cuda, not ${DEVICE}" >&2; exit 1 ;; \
    esac && \
    /opt/slipstream/bin/pip install --disable-pip-version-check --requirement requirements.txt

# The code and the bundled models, as one wheel.
FROM ${PYTHON} AS wheel
WORKDIR /src
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/build && /opt/build/bin/pip install --disable-pip-version-check "setuptools==80.9.0"
COPY pyproject.toml README.md ./
COPY deploy/docs/LICENSE ./deploy/docs/
COPY app ./app
COPY models ./models
RUN /opt/build/bin/pip wheel --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir /dist .

FROM ${PYTHON} AS server
ARG APT_PACKAGES=""
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN if [[ -n "${APT_PACKAGES}" ]]; then \
        apt-get update && apt-get install -y --no-install-recommends ${APT_PACKAGES} && rm -rf /var/lib/apt/lists/*; \
    fi && \
    useradd --uid 10001 --user-group --no-create-home --home-dir /cache --shell /usr/sbin/nologin slipstream && \
    install --directory --owner=10001 --group=10001 /cache
COPY --from=dependencies /opt/slipstream /opt/slipstream
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    /opt/slipstream/bin/pip install --disable-pip-version-check --no-deps --no-index --no-cache-dir /dist/*.whl

# All that is written goes to /cache (downloaded models, compiled kernels) and /tmp: the rest may be read-only.
ENV PATH=/opt/slipstream/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton \
    MPLCONFIGDIR=/tmp/matplotlib \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    SLIPSTREAM_HOST=0.0.0.0 \
    SLIPSTREAM_PORT=8000
WORKDIR /cache
VOLUME /cache
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-c", \
    "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"SLIPSTREAM_PORT\"]}/health/ready', timeout=4)"]

# Exec form: the server is process 1, so SIGTERM reaches it and it drains.
STOPSIGNAL SIGTERM
ENTRYPOINT ["slipstream"]
CMD ["serve"]
