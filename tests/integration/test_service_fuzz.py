"""Whatever is sent: no 5xx, and every refusal in the error shape, naming the field. On a model of two steps at most."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from app.http.main import create_app
from app.http.schemas.requests import GenerationRequest
from app.settings import Settings
from models import Backbone
from models.accelerators import REGISTRY


def short(backbone: Backbone) -> Backbone:
    """The same model, which takes two steps where none are given."""
    return replace(backbone, spec=replace(backbone.spec, default_steps=2))


SMALL: dict[str, Any] = {"max_steps": 2, "max_images": 2, "max_pixels": 32 * 32, "max_rows": 8, "torch_threads": 1}


@pytest.fixture(scope="module")
def url(
    student_of: Callable[..., Backbone],
    backbone_of: Callable[..., Backbone],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """A server with a store that takes only short requests, on a socket of its own."""
    models = {"sd": short(student_of("sd")), "dit": short(backbone_of("dit"))}
    app = create_app(Settings(model=tuple(models), data_dir=tmp_path_factory.mktemp("store"), **SMALL), models)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not (server.started and app.state.engine.ready):
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    """One connection to it."""
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def check(answer: httpx.Response) -> None:
    """No 5xx; refusals in the error shape, naming a field where the body was JSON."""
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        if answer.status_code in (404, 422):
            assert error["param"], error


CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def test_the_api_is_as_it_says(url: str) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def conforms(case: schemathesis.Case) -> None:
            answer = case.call()
            if answer.status_code != 504:  # a deadline of nanoseconds passes
                case.validate_response(answer, checks=CHECKS)

        conforms()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
MODES = st.sampled_from([*REGISTRY, "warp9"])
PARAMETERS = st.sampled_from(sorted({name for a in REGISTRY.values() for name in a.model_fields} | {"plan", "x"}))
ACCELERATION = st.builds(
    lambda mode, parameters: {**parameters, "mode": mode},
    MODES,
    st.dictionaries(PARAMETERS, st.integers(-1, 9) | st.floats(0, 1) | JSON, max_size=2),
)
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["sd", "dit", "nope"]),
    "class_label": st.integers(-1, 1001),
    "width": st.sampled_from([8, 16, 30, 32, 64]),
    "height": st.sampled_from([8, 16, 32]),
    "num_inference_steps": st.integers(-1, 3),
    "num_images": st.integers(0, 3),
    "seed": st.integers(-1, 2**64),
    "guidance_scale": st.floats(),
    "scheduler": st.sampled_from(["ddim", "euler", "heun", "unipc", "lcm", "pndm", "dpmpp_2m_karras", "x"]),
    "strength": st.floats(-0.1, 1.1),
    "timestep_warp": st.floats(0, 30),
    "acceleration": ACCELERATION | st.lists(ACCELERATION, max_size=4),
    "stream": st.booleans(),
    "partial_images": st.integers(-1, 11),
    "output_format": st.sampled_from(["png", "jpeg", "webp", "gif"]),
    "image": st.text(max_size=8) | st.sampled_from(["QUJD", "data:image/png;base64,iVBORw0KGgo="]),
    "timeout_seconds": st.floats(-1, 700).filter(lambda t: not 0 < t < 5),
}
BODIES = st.fixed_dictionaries(
    {"prompt": st.text(max_size=12)},
    optional={
        name: LIKELY.get(name, JSON) | st.none() if name in LIKELY else JSON
        for name in [*GenerationRequest.model_fields, "unknown"]
        if name != "prompt"
    },
)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(body=BODIES)
def test_any_body(client: httpx.Client, body: dict[str, Any]) -> None:
    check(client.post("/generate", content=json.dumps(body).encode(), headers={"Content-Type": "application/json"}))
