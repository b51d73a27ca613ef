"""Clients that people have, unchanged, against a server of this process: openai, litellm, webuiapi."""

from __future__ import annotations

import base64
import inspect
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from PIL import Image
from webuiapi import WebUIApi

from app.http.main import create_app
from app.settings import Settings
from models import Backbone
from tests.serving import PROMPT, aio, pixels, serving, slowed

KEY = "a key"
SIZE = (48, 32)


class Server:
    """A server that listens, in a thread."""

    def __init__(self, backbones: dict[str, Backbone], **settings: Any) -> None:
        options = {"torch_threads": 1, "max_rows": 8, "api_keys": (KEY,), "alias": ("dall-e-3=sd",), **settings}
        self.app = create_app(Settings(model=tuple(backbones), **options), backbones)
        config = uvicorn.Config(self.app, port=0, log_config=None, lifespan="on")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        while not self._server.started or self.app.state.engine.state == "loading":
            assert self._thread.is_alive()
            self._thread.join(0.02)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture(scope="module")
def server(student_of: Callable[..., Backbone]) -> Iterator[Server]:
    with Server({"sd": student_of("sd")}) as running:
        yield running


def picture(size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.linear_gradient("L").resize(size).convert("RGB")


def png(size: tuple[int, int] = SIZE) -> bytes:
    out = io.BytesIO()
    picture(size).save(out, "PNG")
    return out.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def numbers(image: Image.Image) -> Any:
    return np.asarray(image.convert("RGB")).astype(np.int16)


def plain(server: Server, **body: Any) -> Any:
    """What /generate says to the same, as numbers."""
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{server.url}/generate", json={"prompt": PROMPT} | body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return pixels(answer.json())


GENERATE: dict[str, Any] = {
    "background": "opaque",
    "complexity": "high",
    "frame_count": None,
    "frame_duration_ms": None,
    "model": "dall-e-3",
    "moderation": "low",
    "n": 2,
    "output_compression": 80,
    "output_format": "jpeg",
    "partial_images": 1,
    "prompt": PROMPT,
    "quality": "hd",
    "response_format": "b64_json",
    "safety_identifier": "someone",
    "size": "48x32",
    "stream": False,
    "svg": None,
    "style": "vivid",
    "user": "somebody",
}
EDIT = {name: value for name, value in GENERATE.items() if name not in ("moderation", "style")} | {
    "image": ("a.png", png(), "image/png"),
    "input_fidelity": "high",
    "quality": "xhigh",
}
NOT_OURS = {"self", "extra_headers", "extra_query", "extra_body", "timeout", "mask", "markup"}
FEW = {"num_inference_steps": 4, "seed": 5}


@pytest.mark.parametrize(("method", "fields"), [("generate", GENERATE), ("edit", EDIT)])
def test_openai_with_every_field_of_its_signature(server: Server, method: str, fields: dict[str, Any]) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        call = getattr(client.images, method)
        assert set(inspect.signature(call).parameters) - NOT_OURS == set(fields)
        result = call(**fields, extra_body=FEW)
        assert len(result.data) == 2
        image = opened(base64.b64decode(result.data[0].b64_json))
        assert (image.format, image.size) == ("JPEG", SIZE)
        streamed = call(**fields | {"stream": True, "n": 1, "response_format": "b64_json"}, extra_body=FEW)
        assert [event.type.rsplit(".", 1)[-1] for event in streamed] == ["partial_image", "completed"]


def test_openai_gets_addresses(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        result = client.images.generate(
            prompt=PROMPT, model="dall-e-3", n=2, size="32x32", response_format="url", extra_body=FEW
        )
        assert client.models.retrieve("dall-e-3").id == "sd"
    found = [httpx.get(image.url or "") for image in result.data or []]  # without a key
    assert [answer.headers["content-type"] for answer in found] == ["image/png"] * 2
    assert found[0].headers["cache-control"].startswith("private, max-age=3")
    first = numbers(opened(found[0].content))
    assert np.abs(first - plain(server, width=32, height=32, **FEW)).max() <= 1
    assert np.abs(first - numbers(opened(found[1].content))).max() > 1
    assert all(image.b64_json is None for image in result.data or [])
    url = (result.data or [])[0].url or ""
    assert httpx.get(url.replace(url[-12:-4], "0" * 8)).status_code == 404


@aio
async def test_addresses_expire_and_are_bounded(backbone_of: Callable[..., Backbone]) -> None:
    async with serving({"sd": backbone_of("sd")}, public_url="https://pictures.example/", link_seconds=100) as served:
        links = served.app.state.links
        body = {"response_format": "url", "num_inference_steps": 1, "prompt": PROMPT}
        answer = await served.client.post("/v1/images/generations", json=body)
        [shown] = answer.json()["data"]
        assert set(shown) == {"url", "seed"}
        assert shown["url"].startswith("https://pictures.example/v1/images/links/")
        path = shown["url"].removeprefix("https://pictures.example")
        assert (await served.client.get(path)).status_code == 200
        links._max_bytes = links.bytes
        second = (await served.client.post("/v1/images/generations", json=body)).json()["data"][0]["url"]
        assert (await served.client.get(path)).status_code == 404  # the older one gave way
        path = second.removeprefix("https://pictures.example")
        assert (await served.client.get(path)).status_code == 200
        now = links._clock()
        links._clock = lambda: now + 101
        assert (await served.client.get(path)).status_code == 404
        assert links.bytes == 0


@aio
async def test_addresses_live_in_the_store(backbone_of: Callable[..., Backbone], tmp_path: Path) -> None:
    backbones = {"sd": backbone_of("sd")}
    body = {"response_format": "url", "num_inference_steps": 1, "prompt": PROMPT, "output_format": "webp"}
    async with serving(backbones, data_dir=tmp_path) as served:
        answer = await served.client.post("/v1/images/generations", json=body)
        url = answer.json()["data"][0]["url"]
        assert (await served.client.get("/v1/files")).json()["data"] == []
    async with serving(backbones, data_dir=tmp_path) as served:  # after a restart
        found = await served.client.get(url)
        assert (found.status_code, found.headers["content-type"]) == (200, "image/webp")
        none = await served.client.get(f"/v1/images/links/file-{'0' * 32}.webp")
        assert (none.status_code, none.json()["error"]["param"]) == (404, None)
        links = served.app.state.links
        now = links._clock()
        links._clock = lambda: now + 3601
        assert (await served.client.get(url)).status_code == 404


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("background", {"background": "transparent"}),
        ("output_compression", {"output_compression": 50}),
        ("output_compression", {"output_compression": 101, "output_format": "jpeg"}),
        ("response_format", {"response_format": "url", "stream": True}),
        ("style", {"style": "loud"}),
        ("output_format", {"output_format": "gif"}),
        ("frame_count", {"frame_count": 4}),
        ("svg", {"svg": {"model": "x"}}),
        ("model", {"model": "dall-e-2"}),
    ],
)
def test_what_openais_fields_cannot_be(server: Server, field: str, given: dict[str, Any]) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "x"} | given, headers=headers)
    assert answer.status_code == (404 if field == "model" else 422)
    assert answer.json()["error"]["param"] == field


def test_compression_makes_smaller_files(server: Server) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    sizes = []
    for quality in (100, None, 10):
        body = {"prompt": PROMPT, "output_format": "webp", "output_compression": quality, **FEW}
        answer = httpx.post(f"{server.url}/generate", json=body, headers=headers, timeout=60).json()
        sizes.append(len(answer["images"][0]["b64_json"]))
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.filterwarnings("ignore::UserWarning:pydantic", "ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_litellm(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no download of prices
    litellm = pytest.importorskip("litellm")
    shared = {"api_base": f"{server.url}/v1", "api_key": KEY, "model": "openai/dall-e-3", "prompt": PROMPT}
    made = litellm.image_generation(**shared, n=2, size="48x32", quality="high")
    assert [opened(base64.b64decode(image.b64_json)).size for image in made.data] == [SIZE] * 2
    edited = litellm.image_edit(**shared, image=io.BytesIO(png()), size="48x32")
    assert opened(base64.b64decode(edited.data[0].b64_json)).size == SIZE


@pytest.fixture
def webui(server: Server) -> WebUIApi:
    return WebUIApi(baseurl=f"{server.url}/sdapi/v1", sampler="DDIM", steps=3, username="any", password=KEY)


def test_webuiapi_makes_pictures(server: Server, webui: WebUIApi) -> None:
    options = {"prompt": PROMPT, "seed": 7, "cfg_scale": 3.0, "width": 48, "height": 32}
    made = webui.txt2img(**options, batch_size=2, negative_prompt="blue")
    assert [image.size for image in made.images] == [SIZE] * 2
    ours = {"seed": 7, "width": 48, "height": 32, "num_inference_steps": 3, "scheduler": "ddim"}
    expected = plain(server, **ours, guidance_scale=3.0, negative_prompt="blue")
    assert np.abs(numbers(made.images[0]) - expected).max() <= 1
    assert (made.info["all_seeds"], made.info["sampler_name"], made.info["steps"]) == ([7, 8], "DDIM", 3)
    faster = webui.txt2img(**options, override_settings={"acceleration": {"mode": "deepcache", "interval": 2}})
    assert faster.info["acceleration"][0]["mode"] == "deepcache"
    expected = plain(server, **ours, guidance_scale=3.0, acceleration={"mode": "deepcache", "interval": 2})
    assert np.abs(numbers(faster.image) - expected).max() <= 1


def test_webuiapi_changes_pictures(server: Server, webui: WebUIApi) -> None:
    changed = webui.img2img(
        images=[picture()], prompt=PROMPT, seed=3, denoising_strength=0.7, width=48, height=32, steps=4
    )
    asked = {"seed": 3, "width": 48, "height": 32, "num_inference_steps": 4, "strength": 0.7, "scheduler": "ddim"}
    expected = plain(server, image=base64.b64encode(png()).decode(), guidance_scale=7.0, **asked)
    assert np.abs(numbers(changed.image) - expected).max() <= 1
    mask = Image.new("L", SIZE)
    mask.paste(255, (24, 0, 48, 32))
    half = webui.img2img(
        images=[picture()], mask_image=mask, prompt=PROMPT, seed=3, denoising_strength=0.7, width=48, height=32, steps=4
    )
    out = io.BytesIO()
    mask.save(out, "PNG")
    masks = {"image": base64.b64encode(png()).decode(), "mask": base64.b64encode(out.getvalue()).decode()}
    assert np.abs(numbers(half.image) - plain(server, **masks, guidance_scale=7.0, **asked)).max() <= 1
    assert np.abs(numbers(half.image) - numbers(changed.image))[:, :16].max() > 1


def test_webuiapi_knows_the_server(webui: WebUIApi) -> None:
    assert webui.util_get_model_names() == ["sd"]
    assert "Euler a" in webui.util_get_sampler_names()
    assert webui.util_get_scheduler_names() == ["automatic", "karras"]
    webui.util_set_model("sd")
    webui.set_options({"acceleration": [{"mode": "forecast", "interval": 2}], "samples_format": "jpg"})
    kept = webui.get_options()
    assert (kept["sd_model_checkpoint"], kept["samples_format"]) == ("sd", "jpeg")
    assert kept["acceleration"][0]["mode"] == "forecast"
    made = webui.txt2img(prompt=PROMPT, width=32, height=32)
    assert (made.image.format, made.info["acceleration"][0]["mode"]) == ("JPEG", "forecast")
    webui.set_options({"acceleration": [], "samples_format": "png"})
    assert webui.txt2img(prompt=PROMPT, width=32, height=32).info["acceleration"] == []
    assert webui.get_progress()["progress"] == 0.0
    assert webui.get_loras() == []  # a student is none


@pytest.mark.parametrize(
    ("param", "given"),
    [
        ("enable_hr", {"enable_hr": True}),
        ("styles", {"styles": ["anime"]}),
        ("subseed_strength", {"subseed_strength": 0.5}),
        ("sampler_name", {"sampler_name": "DPM fast"}),
        ("scheduler", {"sampler_name": "Euler", "scheduler": "Karras"}),
        ("alwayson_scripts", {"alwayson_scripts": {"roop": {"args": ["x"]}}}),
        ("override_settings", {"override_settings": {"sd_hypernetwork": "x"}}),
        ("override_settings", {"override_settings": {"acceleration": {"mode": "deepcache", "interval": 0}}}),
        ("override_settings.model", {"override_settings": {"sd_model_checkpoint": "v1-5"}}),
        ("steps", {"steps": 251}),
        ("steps", {"steps": 0}),
        ("seed", {"seed": -2}),
        ("batch_size", {"batch_size": 20}),
        ("strange", {"strange": 1}),
        ("prompt", {"prompt": "x <lora:style:much>"}),
        ("loras.0.name", {"prompt": "x <lora:style:0.5>"}),
    ],
)
def test_what_cannot_be_asked_as_these_tools_do(server: Server, param: str, given: dict[str, Any]) -> None:
    body = {"prompt": "x", "width": 32, "height": 32, "steps": 2} | given
    answer = httpx.post(f"{server.url}/sdapi/v1/txt2img", json=body, auth=("any", KEY))
    assert answer.status_code == (404 if param.endswith("model") else 422), answer.text
    assert answer.json()["error"]["param"] == param
    assert answer.json()["error"]["message"].startswith(param.split(".")[0])


def test_fields_at_rest_may_stand(server: Server) -> None:
    body = {"prompt": "x", "width": 32, "height": 32, "steps": 1, "enable_hr": False, "styles": None, "eta": None}
    body |= {"sampler_index": "Euler", "scheduler": None, "alwayson_scripts": {"roop": {"args": [False]}}}
    answer = httpx.post(f"{server.url}/sdapi/v1/txt2img", json=body | {"send_images": False}, auth=("any", KEY))
    assert (answer.status_code, answer.json()["images"]) == (200, [])
    assert httpx.post(f"{server.url}/sdapi/v1/txt2img", json=body, auth=("any", "no key")).status_code == 401


def test_progress_and_interrupt(backbone_of: Callable[..., Backbone]) -> None:
    """Each client sees and ends its own."""
    keys = (KEY, "another")
    with (
        Server({"sd": slowed(backbone_of("sd"), 0.05)}, api_keys=keys) as server,
        ThreadPoolExecutor(1) as thread,
    ):
        mine, other = (WebUIApi(baseurl=f"{server.url}/sdapi/v1", username="any", password=key) for key in keys)
        work = thread.submit(mine.txt2img, prompt=PROMPT, width=32, height=32, steps=200, sampler_name="DDIM")
        seen: list[dict[str, Any]] = []
        while not seen or seen[-1]["progress"] == 0:
            assert not work.done()
            seen.append(mine.get_progress())
        assert 0 < seen[-1]["progress"] < 1
        assert seen[-1]["state"]["sampling_steps"] == 200
        assert seen[-1]["eta_relative"] > 0
        assert other.get_progress()["progress"] == 0
        other.interrupt()
        assert mine.get_progress()["progress"] > 0
        mine.interrupt()
        ended = work.result(timeout=30)
        assert (ended.images, ended.info["interrupted"]) == ([], True)
        assert mine.get_progress()["progress"] == 0
        engine = server.app.state.engine
        headers = {"Authorization": f"Bearer {KEY}"}
        while "slipstream_requests_running 0.0" not in httpx.get(f"{server.url}/metrics", headers=headers).text:
            assert engine.state == "ready"
