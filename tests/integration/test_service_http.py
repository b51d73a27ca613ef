"""The routes on small random models: every shape of answer, every header, limits, keys, the OpenAI client."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import openai
import pytest
import torch
from PIL import Image

from models import Backbone, Request, generate
from models.accelerators import DeepCache
from tests.serving import PROMPT, Served, aio, events, pixels, serving

Student = Callable[..., Backbone]


def served_models(student_of: Student, backbone_of: Student) -> dict[str, Backbone]:
    return {"sd": student_of("sd"), "dit": backbone_of("dit")}


def picture(size: tuple[int, int] = (40, 24), kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(out, kind)
    return out.getvalue()


@aio
async def test_threads_of_the_pool_compute_alone(student_of: Student) -> None:
    """A second team of OpenMP threads in the process would double the time of every step on the engine's."""
    async with serving({"sd": student_of("sd")}) as served:
        torch.set_num_threads(2)
        try:
            assert await served.app.state.service.pool.run(torch.get_num_threads) == 1
        finally:
            torch.set_num_threads(1)


@aio
async def test_json_answers_equal_the_library(student_of: Student) -> None:
    backbone = student_of("sd")
    async with serving({"sd": backbone}) as served:
        answer = await served.post(num_images=2, seed=7, acceleration={"mode": "deepcache", "interval": 2})
    assert answer.status_code == 200
    body = answer.json()
    request = Request(prompt=PROMPT, num_inference_steps=3, seed=7, num_images=2, acceleration=DeepCache(interval=2))
    expected = generate(backbone, [request])[0]
    for i, image in enumerate(expected.images):
        assert np.abs(pixels(body, i) - np.asarray(image).astype(np.int16)).max() <= 1
    assert [image["seed"] for image in body["images"]] == [7, 8]
    usage = {
        "steps": 3,
        "evaluations": 3,
        "rows": 12,
        "macs": expected.usage.macs,
        "macs_unaccelerated": expected.usage.macs_unaccelerated,
    }
    assert body["usage"] == usage
    assert body["acceleration"][0]["mode"] == "deepcache"
    assert body["acceleration"][0]["branch"] == 0
    assert body["timing"]["total_seconds"] >= body["timing"]["denoise_seconds"] > 0
    assert (body["width"], body["height"], body["output_format"], body["model"]) == (32, 32, "png", "sd")


@aio
async def test_bytes_with_facts_in_headers_and_in_the_file(student_of: Student) -> None:
    async with serving({"sd": student_of("sd")}) as served:
        plain = (await served.post(acceleration={"mode": "deepcache"})).json()
        for kind in ("png", "jpeg", "webp"):
            answer = await served.post(headers={"Accept": f"image/{kind}"}, acceleration={"mode": "deepcache"})
            assert answer.status_code == 200, answer.text
            assert answer.headers["content-type"] == f"image/{kind}"
            assert Image.open(io.BytesIO(answer.content)).format == kind.upper()
            assert answer.headers["x-slipstream-seed"] == "1"
            assert answer.headers["x-slipstream-macs"] == str(plain["usage"]["macs"])
            assert json.loads(answer.headers["x-slipstream-acceleration"])[0]["interval"] == 3
        file = Image.open(io.BytesIO(base64.b64decode(plain["images"][0]["b64_json"])))
        again = json.loads(file.text["slipstream"])  # type: ignore[attr-defined]
        assert file.text["seed"] == "1"  # type: ignore[attr-defined]
        repeated = (await served.client.post("/generate", json=again)).json()
        assert (pixels(repeated) == pixels(plain)).all()
        refused = await served.post(headers={"Accept": "image/png"}, num_images=2)
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "num_images")


@aio
async def test_a_stream_of_events(student_of: Student) -> None:
    async with serving({"sd": student_of("sd")}) as served:
        answer = await served.post(stream=True, partial_images=2, num_inference_steps=6)
        plain = await served.post(num_inference_steps=6)
    found = events(answer.text)
    names = [name for name, _ in found]
    assert names[0] == "queued"
    assert found[0][1]["position"] == 0
    assert names.count("progress") == 6
    assert [data["step"] for name, data in found if name == "partial_image"] == [2, 4]
    assert names[-1] == "completed"
    assert (pixels(found[-1][1]) == pixels(plain.json())).all()


@aio
async def test_image_to_image_by_json_and_by_form(student_of: Student) -> None:
    async with serving({"sd": student_of("sd")}) as served:
        encoded = base64.b64encode(picture()).decode()
        ours = await served.post(image=encoded, strength=0.7, num_inference_steps=4)
        assert ours.status_code == 200, ours.text
        assert ours.json()["usage"]["steps"] == 2
        form = {"prompt": PROMPT, "strength": "0.7", "num_inference_steps": "4", "seed": "1", "model": "sd", "n": "1"}
        theirs = await served.client.post("/v1/images/edits", data=form, files={"image": ("a.png", picture())})
        assert theirs.status_code == 200, theirs.text
        assert theirs.json()["data"][0]["b64_json"] == ours.json()["images"][0]["b64_json"]
        nested = form | {"acceleration[mode]": "deepcache", "acceleration[interval]": "2"}
        answer = await served.client.post("/v1/images/edits", data=nested, files={"image": ("a.png", picture())})
        assert answer.json()["acceleration"][0]["interval"] == 2
        whole = form | {"acceleration": '[{"mode": "depth_skip", "depth": 2}]'}
        answer = await served.client.post("/v1/images/edits", data=whole, files={"image": ("a.png", picture())})
        assert answer.json()["acceleration"][0]["mode"] == "depth_skip"
        for bad, files, param in (
            ({}, {"image": ("a.png", picture())}, "prompt"),
            (form | {"mask": "x"}, {"image": ("a.png", picture())}, "mask"),
            (form, {"other": ("a.png", picture())}, "other"),
            (form, {"image": ("a.png", b"no picture")}, "image"),
            (form | {"strength": "much"}, {"image": ("a.png", picture())}, "strength"),
        ):
            answer = await served.client.post("/v1/images/edits", data=bad, files=files)
            assert (answer.status_code, answer.json()["error"]["param"]) == (422, param), answer.text
        assert (await served.client.post("/v1/images/edits", json={})).status_code == 400


@aio
async def test_refusals(student_of: Student, backbone_of: Student) -> None:
    cases: list[tuple[dict[str, Any], int, str | None]] = [
        ({"model": "nope"}, 404, "model"),
        ({"num_inference_steps": 999}, 422, "num_inference_steps"),
        ({"num_images": 999}, 422, "num_images"),
        ({"width": 33}, 422, "width"),
        ({"width": 128, "height": 64}, 422, "width"),
        ({"height": 8192}, 422, "height"),
        ({"prompt": "x" * 101}, 422, "prompt"),
        ({"negative_prompt": "x" * 101}, 422, "negative_prompt"),
        ({"timeout_seconds": 1e6}, 422, "timeout_seconds"),
        ({"scheduler": "magic"}, 422, "scheduler"),
        ({"image": "???"}, 422, "image"),
        ({"image": base64.b64encode(picture((200, 200))).decode()}, 422, "image"),
        ({"acceleration": {"mode": "delta_dit"}}, 422, "acceleration.mode"),
        ({"acceleration": {"mode": "deepcache", "branch": 999}}, 422, "acceleration.branch"),
        ({"acceleration": [{"mode": "deepcache"}, {"mode": "depth_skip", "depth": 1}]}, 422, "acceleration"),
        ({"acceleration": {"mode": "cfg_student"}, "guidance_scale": 9.0}, 422, "guidance_scale"),
        ({"model": "dit", "prompt": ""}, 422, "class_label"),
        ({"model": "dit", "prompt": "", "class_label": 1000}, 422, "class_label"),
        ({"unknown": 1}, 422, "unknown"),
    ]
    limits = {"max_prompt_length": 100, "max_image_pixels": 10_000, "max_body_bytes": 100_000}
    async with serving(served_models(student_of, backbone_of), **limits) as served:
        for body, status, param in cases:
            answer = await served.post(**body)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (status, param), (body, error)
            assert set(error) == {"message", "type", "param", "code"}
        for content, status in (
            (b"{", 400),
            (b"[]", 400),
            (b'{"prompt": "' + b"x" * 200_000 + b'"}', 413),
            (b"\xff", 400),
        ):
            answer = await served.client.post(
                "/generate", content=content, headers={"Content-Type": "application/json"}
            )
            assert answer.status_code == status, answer.text
            assert answer.json()["error"]["message"]

        async def trickle() -> Any:
            for _ in range(200):
                yield b" " * 1000

        answer = await served.client.post("/generate", content=trickle(), headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        assert (await served.client.get("/nowhere")).json()["error"]["code"] == "not_found"
        assert (await served.client.get("/generate")).json()["error"]["code"] == "method_not_allowed"
        assert (await served.post(model="dit", prompt="", class_label=3)).status_code == 200


@aio
async def test_what_can_be_asked_for(student_of: Student, backbone_of: Student) -> None:
    async with serving(served_models(student_of, backbone_of)) as served:
        models = {model["id"]: model for model in (await served.client.get("/v1/models")).json()["data"]}
        assert models["sd"]["default"]
        assert models["sd"]["adapters"][0]["name"] == "student"
        assert "ddim" in models["sd"]["schedulers"]
        modes = {a["mode"] for a in models["sd"]["accelerators"]}
        assert {"deepcache", "cfg_student", "selective_guidance"} <= modes
        assert "delta_dit" not in modes
        assert models["dit"]["conditioning"] == "class"
        listed = (await served.client.get("/accelerators")).json()["data"]
        deepcache = next(a for a in listed if a["mode"] == "deepcache")
        assert deepcache["models"] == ["sd"]
        assert deepcache["parameters"]["properties"]["interval"]["default"] == 3
        assert deepcache["title"]
        openapi = (await served.client.get("/openapi.json")).json()
        assert openapi["paths"]["/generate"]["post"]["responses"]["429"]
        assert openapi["components"]["schemas"]["GenerationRequest"]["examples"]
        assert (await served.client.get("/health/live")).json() == {"status": "alive"}
        assert (await served.client.get("/health/ready")).json() == {"status": "ready"}


@aio
async def test_ids_and_safe_headers(student_of: Student) -> None:
    async with serving({"sd": student_of("sd")}) as served:
        given = await served.client.get("/health/live", headers={"X-Request-Id": "my-id_1"})
        assert given.headers["x-request-id"] == "my-id_1"
        made = await served.client.get("/health/live", headers={"X-Request-Id": "bad id\x7f"})
        assert made.headers["x-request-id"] not in ("", "bad id\x7f")
        page = await served.client.get("/")
        assert page.status_code == 200
        assert "script-src 'self'" in page.headers["content-security-policy"]
        assert page.headers["x-content-type-options"] == "nosniff"
        assert (await served.client.get("/web/favicon.svg")).status_code == 200
        for path in ("/web/../settings.py", "/web/%2e%2e/settings.py", "/web/..%2fsettings.py"):
            assert (await served.client.get(path)).status_code == 404
        preflight = {"Origin": "https://x.example", "Access-Control-Request-Method": "POST"}
        assert (
            "access-control-allow-origin" not in (await served.client.options("/generate", headers=preflight)).headers
        )
    async with serving({"sd": student_of("sd")}, cors_origins=("https://x.example",)) as served:
        answer = await served.client.options("/generate", headers=preflight)
        assert answer.headers["access-control-allow-origin"] == "https://x.example"


@aio
async def test_keys(student_of: Student) -> None:
    async with serving({"sd": student_of("sd")}, api_keys=("good", "better"), metrics_require_key=True) as served:

        async def status(path: str, key: str | bytes | None) -> int:
            headers: Any = {} if key is None else {"Authorization": key}
            return (await served.client.get(path, headers=headers)).status_code

        for key in (None, "Bearer bad", "Bearer ", "Basic good", "good", "Bearer good2", b"Bearer \xc3\xbc\xff"):
            assert await status("/v1/models", key) == 401
        assert await status("/v1/models", "Bearer good") == await status("/v1/models", "bearer better") == 200
        assert await status("/metrics", None) == 401
        described = (await served.client.get("/openapi.json")).json()
        assert described["security"] == [{"key": []}]
        assert described["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
        assert await status("/docs", None) == await status("/docs-assets/swagger-ui.css", None) == 200
        assert (
            await status("/health/ready", None) == await status("/", None) == await status("/web/main.js", None) == 200
        )
        refused = await served.post()
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert served.value("requests_total", endpoint="/generate", model="unknown", acceleration="unknown",
                            outcome="unauthorized") == 1  # fmt: skip
    async with serving({"sd": student_of("sd")}, api_keys=("good", "ключ")) as served:
        assert (await served.client.get("/metrics")).status_code == 200
        spelt = {"Authorization": "Bearer ключ".encode()}
        assert (await served.client.get("/v1/models", headers=cast(Any, spelt))).status_code == 200


@aio
async def test_methods(student_of: Student) -> None:
    async with serving({"sd": student_of("sd")}) as served:
        got, headed = await served.client.get("/v1/models"), await served.client.head("/v1/models")
        assert (headed.status_code, headed.content) == (200, b"")
        assert headed.headers["content-length"] == got.headers["content-length"] == str(len(got.content))
        for method, path, allowed in (
            ("GET", "/generate", "POST"),
            ("HEAD", "/generate", "POST"),
            ("POST", "/v1/models", "GET, HEAD"),
            ("PUT", "/health/live", "GET, HEAD"),
        ):
            refused = await served.client.request(method, path)
            assert (refused.status_code, refused.headers["allow"]) == (405, allowed), (method, path)
        one = await served.client.get("/v1/models/sd")
        assert one.json() == got.json()["data"][0]
        missing = await served.client.get("/v1/models/" + "x" * 5000)
        error = missing.json()["error"]
        assert (missing.status_code, error["code"], error["param"]) == (404, "model_not_found", "model_id")
        assert len(error["message"]) < 300


def client_of(served: Served, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="key", http_client=cast(Any, served.client), max_retries=0, **options
    )


@aio
async def test_the_openai_client(student_of: Student) -> None:
    async with serving({"sd": student_of("sd")}, api_keys=("key",)) as served:
        client = client_of(served)
        extra = {"num_inference_steps": 4, "seed": 3, "acceleration": {"mode": "deepcache", "interval": 2}}
        result = await client.images.generate(model="sd", prompt=PROMPT, n=2, size="32x32", extra_body=extra)
        assert result.data is not None
        assert len(result.data) == 2
        image = Image.open(io.BytesIO(base64.b64decode(result.data[0].b64_json or "")))
        assert image.size == (32, 32)
        stream = await client.images.generate(
            model="sd", prompt=PROMPT, stream=True, partial_images=1, extra_body={"num_inference_steps": 4}
        )
        kinds = [event.type async for event in stream]
        assert kinds == ["image_generation.partial_image", "image_generation.completed"]
        edited = await client.images.edit(
            model="sd", prompt=PROMPT, image=("a.png", picture(), "image/png"), extra_body={"num_inference_steps": 4}
        )
        assert edited.data is not None
        assert edited.data[0].b64_json
        assert [model.id async for model in client.models.list()] == ["sd"]
        with pytest.raises(openai.NotFoundError):
            await client.images.generate(model="dall-e-2", prompt=PROMPT)
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            await client.images.generate(model="sd", prompt=PROMPT, size="33x33")
        assert caught.value.param == "width"
        assert caught.value.code == "out_of_range"
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").images.generate(model="sd", prompt=PROMPT)


def clear_left(size: tuple[int, int] = (40, 24)) -> bytes:
    """A mask as OpenAI's clients send it: transparent where the picture is to change."""
    mask = Image.new("RGBA", size, "black")
    mask.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    out = io.BytesIO()
    mask.save(out, "PNG")
    return out.getvalue()


@aio
async def test_masks_in_json_in_forms_and_by_openais_client(student_of: Student) -> None:
    backbone = student_of("sd")
    asked: dict[str, Any] = {"seed": 5, "num_inference_steps": 3, "strength": 0.7}
    async with serving({"sd": backbone}) as served:
        files = {"image": picture(), "mask": clear_left()}
        encoded: dict[str, Any] = {name: base64.b64encode(data).decode() for name, data in files.items()}
        ours = (await served.post(**asked, **encoded)).json()
        client = client_of(served)
        theirs = await client.images.edit(
            image=("a.png", picture()), mask=("m.png", clear_left()), prompt=PROMPT, model="sd", extra_body=asked
        )
        plain = (await served.post(**asked, image=encoded["image"])).json()
        opened = Image.open(io.BytesIO(base64.b64decode(ours["images"][0]["b64_json"])))
        for bad, field in (
            ({"mask": encoded["mask"]}, "mask"),
            ({**encoded, "mask": base64.b64encode(clear_left((40, 20))).decode()}, "mask"),
            ({**encoded, "mask": encoded["image"]}, "mask"),
            ({**encoded, "mask": "no base64!"}, "mask"),
            ({**encoded, "mask": base64.b64encode(b"GIF89a").decode()}, "mask"),
            ({"mask": encoded["mask"], "image": base64.b64encode(b"x").decode()}, "image"),
        ):
            answer = await served.post(**bad)
            assert (answer.status_code, answer.json()["error"]["param"]) == (422, field), answer.text
        twice = [("mask", ("a.png", clear_left()))] * 2 + [("image", ("a.png", picture()))]
        answer = await served.client.post("/v1/images/edits", data={"prompt": PROMPT}, files=twice)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "mask")
        [model] = (await served.client.get("/v1/models")).json()["data"]
        assert (model["image_to_image"], model["inpaints"]) == (True, False)
    mask = Image.open(io.BytesIO(clear_left()))
    source = Image.open(io.BytesIO(picture()))
    [expected] = generate(backbone, [Request(prompt=PROMPT, image=source, mask=mask, **asked)])
    drawn = np.asarray(expected.images[0]).astype(np.int16)
    assert np.abs(pixels(ours) - drawn).max() <= 1
    assert theirs.data is not None
    assert theirs.data[0].b64_json is not None
    same = Image.open(io.BytesIO(base64.b64decode(theirs.data[0].b64_json)))
    assert np.array_equal(np.asarray(same), pixels(ours))
    assert np.abs(pixels(plain) - drawn).max() > 5
    facts = json.loads(opened.info["slipstream"])
    assert {"image_sha256", "mask_sha256", "strength"} <= facts.keys()
    assert not {"image", "mask"} & facts.keys()
