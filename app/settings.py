"""Every setting of the server, once: name, default, range, meaning. Flags and SLIPSTREAM_ variables come from here."""

from __future__ import annotations

from base64 import b64decode
from importlib.util import find_spec
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from models.spec import short_name

Names = Annotated[tuple[str, ...], NoDecode]
"""Several values: a repeated flag, or separated by commas in the environment."""

BUNDLED_MODELS = ("shapes-sd", "shapes-dit")


class Settings(BaseSettings):
    """The server's settings: constructor arguments go before environment variables, those before defaults."""

    model_config = SettingsConfigDict(
        env_prefix="SLIPSTREAM_", extra="ignore", frozen=True, hide_input_in_errors=True, validate_default=False
    )

    model: Names = Field(
        BUNDLED_MODELS,
        description="Models to serve: bundled name, directory, hub id or .safetensors file. First is default.",
    )
    adapter: Names = Field((), description="LoRAs, students or styles, MODEL=PATH each, known by the path's last part.")
    alias: Names = Field(
        (), description="Other names of models, ALIAS=MODEL each: dall-e-3=shapes-sd, for clients that know no other."
    )
    control: Names = Field(
        (), description="Control networks, MODEL=PATH each: directories of a ControlNetModel, known by their last part."
    )
    plan: Names = Field((), description="DiTFastAttn plans, MODEL=PATH each, known by the file's name.")
    profile: Names = Field((), description="Measured profiles, MODEL=PATH each, known by the file's name.")
    config: Names = Field(
        (), description="Configs of single files, MODEL=DIRECTORY each: one in diffusers' layout, of the same family."
    )
    depth: Names = Field(
        (), description="Depth-skip at loading, MODEL=BLOCKS each: the first input blocks of a U-Net, the rest never."
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weights and arithmetic; auto: bfloat16 where that is faster, else float32."
    )
    stepping: Literal["auto", "exact", "batched"] = Field(
        "auto",
        description="Schedulers' own steps, or a whole tick's by tables; auto: exact in float32 on a CPU.",
    )
    compile: bool = Field(False, description="Compile the network's repeated blocks with torch.compile.")
    offload_text_encoders: bool = Field(False, description="Keep text encoders on the host between uses.")
    batch_invariant: bool = Field(
        False, description="Compute each picture by itself: the same bits whatever else is asked for; slower on a GPU."
    )
    torch_threads: int = Field(
        0, ge=0, le=1024, description="CPU threads of an operator; 0: as many as cores are free at start."
    )

    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="Bearer keys; none: no key is asked for."
    )
    admin_key: SecretStr | None = Field(
        None, description="Bearer key that adds and removes adapters, and is an API key too; none: nobody does."
    )
    metrics_require_key: bool = Field(False, description="Whether /metrics asks for a key too.")
    cors_origins: Names = Field((), description="Origins whose pages may call this server; none: CORS is off.")

    max_rows: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = Field(
        "auto", description="Rows a tick; auto measures at start where more rows stop paying."
    )
    max_queue: int = Field(256, ge=1, le=100_000, description="Requests that may wait.")
    max_waiting_bytes: int = Field(
        2**30, ge=2**20, description="What unanswered requests may keep together: uploads, pictures, runs."
    )
    max_feature_bytes: int = Field(
        4 * 2**30, ge=0, description="Remembered features above which no further image is started."
    )
    max_adapter_file_bytes: int = Field(
        2**30, ge=1024, description="Size of an uploaded LoRA; store_bytes bounds all of them together."
    )
    max_adapter_bytes: int = Field(
        4 * 2**30, ge=2**20, description="LoRAs of a model kept on its device; the ones used longest ago leave it."
    )
    decode_chunk: int = Field(4, ge=1, le=64, description="Images decoded between two ticks.")
    max_body_bytes: int = Field(24 * 2**20, ge=1024, description="Size of a request's body, also when unpacked.")
    max_inflight_bytes: int = Field(
        256 * 2**20, ge=2**20, description="Bodies held at once, in bytes; each request's first 64 KiB are free."
    )
    max_connections: int = Field(1024, ge=8, le=1_000_000, description="Connections open at once.")
    head_seconds: float = Field(10.0, gt=0, le=3600, description="Longest wait for the head of a request.")
    body_seconds: float = Field(
        10.0, gt=0, le=3600, description="Longest pause within a body, which comes at 16 KiB a second or more."
    )
    max_pixels: Annotated[int, Field(ge=64)] | Literal["auto"] = Field(
        "auto", description="Width times height of an image; auto is four times the model's native size."
    )
    max_steps: int = Field(250, ge=1, le=1000, description="Inference steps of a request.")
    max_images: int = Field(10, ge=1, le=1000, description="Images of a request.")
    max_prompt_length: int = Field(4000, ge=1, description="Characters of a prompt.")
    max_image_pixels: int = Field(
        2**24, ge=64, description="Pixels of an uploaded image, and of all that are decoded at once; checked before."
    )
    deadline_seconds: float = Field(600.0, gt=0, le=86_400, description="Longest a request may take.")
    link_seconds: float = Field(
        3600.0, gt=0, le=604_800, description="Seconds that pictures asked for as addresses (url) can be read."
    )
    max_link_bytes: int = Field(
        64 * 2**20, ge=2**20, description="Such pictures kept without a store, in bytes; the oldest give way."
    )
    public_url: str | None = Field(
        None,
        pattern=r"^https?://[^\s?#]+$",
        description="What addresses in answers begin with; default as the client itself addressed this server.",
    )
    drain_seconds: float = Field(60.0, ge=0, le=86_400, description="Longest wait for accepted requests on SIGTERM.")

    data_dir: Path | None = Field(
        None, description="Directory of the store of jobs, files and batches (SQLite); none: there is no store."
    )
    jobs_url: SecretStr | None = Field(
        None, description="postgresql+psycopg://... in place of SQLite: several servers share its jobs."
    )
    jobs_in_flight: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = Field(
        "auto", description="Jobs of the store in the engine at once; auto: as many as there are rows a tick."
    )
    job_lease_seconds: float = Field(
        30.0, ge=1, le=3600, description="Shared store: seconds after which jobs of a silent server are taken over."
    )
    max_jobs: int = Field(100_000, ge=1, description="Jobs that may wait in the store.")
    keep_days: float = Field(7.0, gt=0, le=3650, description="Days that finished jobs and files of batches are kept.")
    keep_jobs: int = Field(100_000, ge=0, description="Finished jobs that are kept.")
    store_bytes: int = Field(
        20 * 2**30, ge=2**20, description="Bytes of uploads, pictures and files that the store keeps."
    )

    max_file_bytes: int = Field(200 * 2**20, ge=1024, description="Size of a file of lines for a batch.")
    max_spool_bytes: int = Field(
        2**30, ge=2**20, description="Files of lines that are being sent, together, on their way to the store."
    )
    max_batch_lines: int = Field(50_000, ge=1, le=1_000_000, description="Lines of a batch.")

    webhook_origins: Names = Field(
        (), description="Origins that jobs may name as webhook_url (https://example.com); none: no webhooks."
    )
    webhook_secret: SecretStr | None = Field(
        None, description="Signs webhooks: whsec_ and the base64 of 24 to 64 random bytes."
    )
    webhook_networks: Names = Field(
        (), description="Networks (10.0.0.0/8) of webhooks that are not of the public Internet."
    )

    log_format: Literal["auto", "json", "human"] = Field("auto", description="auto: human on a terminal, else json.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severity logged.")
    log_file: Path | None = Field(None, description="Log into this file instead of standard error.")

    otlp_endpoint: str | None = Field(
        None, description="Collector of OpenTelemetry traces, http://collector:4318 or the like; none: no traces."
    )

    @field_validator(
        *("model", "alias", "adapter", "control", "plan", "profile", "config", "depth", "api_keys", "cors_origins"),
        *("webhook_origins", "webhook_networks"),
        mode="before",
    )
    @classmethod
    def _split(cls, value: object) -> object:
        """Comma separated, as in the environment; a list, as from repeated flags, is taken as it is."""
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("webhook_networks")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            ip_network(network)
        return value

    @field_validator("webhook_secret")
    @classmethod
    def _secret(cls, value: SecretStr | None) -> SecretStr | None:
        """A secret of Standard Webhooks."""
        if value is not None:
            prefix, key = value.get_secret_value()[:6], value.get_secret_value()[6:]
            try:
                length = len(b64decode(key, validate=True))
            except ValueError:
                length = 0
            if prefix != "whsec_" or not 24 <= length <= 64:
                raise ValueError("must be whsec_ and the base64 of 24 to 64 bytes")
        return value

    @model_validator(mode="after")
    def _webhooks(self) -> Self:
        if self.webhook_origins and self.webhook_secret is None:
            raise ValueError("webhook_origins: give webhook_secret too, which signs them")
        return self

    @field_validator("otlp_endpoint")
    @classmethod
    def _collector(cls, value: str | None) -> str | None:
        """An address to which /v1/traces is added, and the packages that can send there."""
        if value is None:
            return None
        try:
            parts = urlsplit(value)
            valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # of a port
            valid = False
        if not valid or parts.username is not None or parts.query or parts.fragment:
            raise ValueError("must be http:// or https:// with a host, without user, query or fragment")
        try:
            found = find_spec("opentelemetry.exporter.otlp.proto.http") and find_spec("opentelemetry.sdk.trace")
        except ModuleNotFoundError:
            found = None
        if not found:
            raise ValueError("needs the extra: pip install 'slipstream-diffusion[otel]'")
        return value

    @field_validator("log_file")
    @classmethod
    def _writable(cls, file: Path | None) -> Path | None:
        """Said at once, not as a traceback later."""
        if file is not None:
            try:
                file.open("a").close()
            except OSError as error:
                raise ValueError(f"{str(file)!r} cannot be written: {error.strerror}") from error
        return file

    @model_validator(mode="after")
    def _served(self) -> Self:
        if not self.model:
            raise ValueError("model: name at least one")
        names = {short_name(model) for model in self.model}
        if len(names) != len(self.model):
            raise ValueError("model: two models of the same name")
        for value in self.alias:
            alias, _, name = value.partition("=")
            if not alias or alias in names or name not in names:
                known = ", ".join(sorted(names))
                raise ValueError(f"alias: {value!r} is not ALIAS=MODEL with a new name for one of {known}")
        for field, values, kind in (
            ("adapter", self.adapter, "PATH"),
            ("control", self.control, "PATH"),
            ("plan", self.plan, "PATH"),
            ("profile", self.profile, "PATH"),
            ("config", self.config, "DIRECTORY"),
            ("depth", self.depth, "BLOCKS"),
        ):
            for value in values:
                name, _, given = value.partition("=")
                if name not in names or not given or (kind == "BLOCKS" and not (given.isdecimal() and int(given))):
                    known, number = ", ".join(sorted(names)), ", and BLOCKS a number from 1" * (kind == "BLOCKS")
                    raise ValueError(f"{field}: {value!r} is not MODEL={kind} with MODEL one of {known}{number}")
        return self

    @property
    def aliases(self) -> dict[str, str]:
        """The models behind other names."""
        return dict(value.split("=", 1) for value in self.alias)

    def blocks(self, model: str) -> int | None:
        """How many input blocks to load of one model; None: all."""
        pairs = dict(value.split("=", 1) for value in self.depth)
        return int(pairs[model]) if model in pairs else None

    def config_of(self, model: str) -> Path | None:
        """Where the configs of one model lie that is a single file."""
        pairs = dict(value.split("=", 1) for value in self.config)
        return Path(pairs[model]) if model in pairs else None

    def files(self, field: Literal["adapter", "control", "plan", "profile"], model: str) -> dict[str, Path]:
        """The adapters, control networks, plans or profiles given for one model, by name."""
        suffix = {"adapter": ".safetensors", "control": "", "plan": ".json", "profile": ".json"}[field]
        pairs = (value.partition("=")[::2] for value in getattr(self, field))
        return {Path(path).name.removesuffix(suffix): Path(path) for name, path in pairs if name == model}
