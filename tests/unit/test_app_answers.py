"""What a client is answered: every value of JSON, headers, files and events, from a run whose values are all known."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import time
from collections.abc import Mapping
from typing import Any

import pytest
from PIL import Image

from app.engine.job import Failed, Progress, Queued
from app.errors import ForwardFailed
from app.http.generation import Generation
from app.http.pictures import QUALITY
from app.logs import REQUESTS
from models import Plan
from tests.faked import COLOURS, DIM, Faked, colour, faked, opened, request_of, specs
from tests.serving import aio, events
from tests.unit.specs import class_spec, dit_spec

ASKED: dict[str, Any] = {
    "prompt": "a ring",
    "negative_prompt": "dull",
    "width": 24,
    "height": 40,
    "num_inference_steps": 3,
    "guidance_scale": 2.5,
    "seed": 70,
    "num_images": 3,
    "scheduler": "dpmpp_2m",
    "timestep_warp": 0.5,
    "acceleration": [{"mode": "deepcache", "interval": 2}, {"mode": "selective_guidance", "stop": 0.5}],
}
DEEPCACHE = {
    "mode": "deepcache",
    "interval": 2,
    "branch": 0,
    "schedule": "uniform",
    "center": 15,
    "power": 1.5,
    "order": 0,
}
GUIDANCE = {"mode": "selective_guidance", "start": 0.0, "stop": 0.5}
FACTS = ASKED | {"model": "unet", "acceleration": [DEEPCACHE, GUIDANCE]}
FACTS = {name: value for name, value in FACTS.items() if name != "num_images"}
USAGE = {"steps": 3, "evaluations": 2, "rows": 24, "macs": 1000, "macs_unaccelerated": 4500}
TIMING = {"queue_seconds": 1.5, "denoise_seconds": 3.5, "decode_seconds": 0.25, "total_seconds": 8.0}


def without_images(body: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """A body without its pictures, its time, and more."""
    assert abs(body["created"] - time.time()) < 60
    return {name: value for name, value in body.items() if name not in ("images", "data", "created", *names)}


def check_images(images: list[dict[str, Any]]) -> None:
    """Three images in their order, each with its own seed, size and request."""
    assert [image["seed"] for image in images] == [70, 71, 72]
    for i, image in enumerate(images):
        picture = opened(image["b64_json"])
        assert (picture.format, picture.size, colour(picture)) == ("PNG", (24, 40), COLOURS[i])
        assert request_of(picture) == FACTS | {"seed": 70 + i}
        assert picture.text["seed"] == str(70 + i)  # type: ignore[attr-defined]


TOKENS: dict[str, Any] = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
"""OpenAI's counts, by which nothing goes here."""


@aio
async def test_every_value_of_a_json_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch) as served:
        answer = await served.post(**ASKED)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    body = answer.json()
    check_images(body["images"])
    assert [set(image) for image in body["images"]] == [{"b64_json", "seed"}] * 3
    assert without_images(body) == {
        "id": f"gen-{answer.headers['x-request-id']}",
        "model": "unet",
        "acceleration": [DEEPCACHE, GUIDANCE],
        "profile": None,
        "usage": USAGE,
        "timing": TIMING,
        "width": 24,
        "height": 40,
        "output_format": "png",
    }


@aio
async def test_every_value_of_openais_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {name: value for name, value in ASKED.items() if name not in ("width", "height", "num_images")}
    async with faked(monkeypatch) as served:
        answer = await served.post("/v1/images/generations", n=3, size="24x40", **asked)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    body = answer.json()
    check_images(body["data"])
    assert without_images(body) == {
        "id": f"gen-{answer.headers['x-request-id']}",
        "model": "unet",
        "acceleration": [DEEPCACHE, GUIDANCE],
        "profile": None,
        "usage": USAGE | TOKENS,
        "timing": TIMING,
        "size": "24x40",
        "width": 24,
        "height": 40,
        "output_format": "png",
    }


@aio
async def test_every_header_of_an_answer_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch) as served:
        answer = await served.post(headers={"Accept": "image/png"}, **ASKED | {"num_images": 1})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    picture = Image.open(io.BytesIO(answer.content))
    assert (picture.format, picture.size, colour(picture)) == ("PNG", (24, 40), COLOURS[0])
    assert request_of(picture) == FACTS
    start = "x-slipstream-"
    found = {name.removeprefix(start): value for name, value in answer.headers.items() if name.startswith(start)}
    assert abs(int(found.pop("created")) - time.time()) < 60
    assert json.loads(found.pop("acceleration")) == [DEEPCACHE, GUIDANCE]
    assert found == {
        "id": f"gen-{answer.headers['x-request-id']}",
        "model": "unet",
        "seed": "70",
        "width": "24",
        "height": "40",
        "output-format": "png",
        "steps": "3",
        "evaluations": "2",
        "rows": "24",
        "macs": "1000",
        "macs-unaccelerated": "4500",
        "queue-seconds": "1.5",
        "denoise-seconds": "3.5",
        "decode-seconds": "0.25",
        "total-seconds": "8.0",
    }


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_lossy_formats(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    expected = io.BytesIO()
    Image.new("RGB", (24, 40), COLOURS[1]).save(expected, kind, quality=95)
    assert QUALITY == 95

    @aio
    async def test() -> None:
        async with faked(monkeypatch) as served:
            body = (await served.post(**ASKED | {"output_format": kind})).json()
            assert body["output_format"] == kind
            picture = opened(body["images"][1]["b64_json"])
            assert picture.format == kind.upper()
            assert picture.tobytes() == Image.open(expected).tobytes()
            answer = await served.post(headers={"Accept": f"image/{kind}"}, **ASKED | {"num_images": 1})
            assert (answer.headers["content-type"], answer.headers["x-slipstream-output-format"]) == (
                f"image/{kind}",
                kind,
            )
            assert Image.open(io.BytesIO(answer.content)).format == kind.upper()

    test()


@aio
async def test_what_accept_and_output_format_may_say_together(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch) as served:
        for accept, fields, kind in (
            ("image/*", {}, "image/png"),
            ("image/*", {"output_format": "webp"}, "image/webp"),
            ("image/jpeg", {"output_format": "jpeg"}, "image/jpeg"),
            ("image/jpeg", {}, "image/jpeg"),
            ("IMAGE/WEBP", {}, "image/webp"),
            ("application/json, image/png", {}, "application/json"),
            ("text/html, image/jpeg;q=0.5", {}, "image/jpeg"),
            ("image/png", {"stream": True, "num_images": 2}, "text/event-stream; charset=utf-8"),
        ):
            answer = await served.post(headers={"Accept": accept}, **fields)
            assert (answer.status_code, answer.headers["content-type"]) == (200, kind), (accept, fields)
        for fields, param in (
            ({"output_format": "webp"}, "output_format"),
            ({"output_format": "png"}, "output_format"),
            ({"num_images": 2}, "num_images"),
        ):
            answer = await served.post(headers={"Accept": "image/jpeg"}, **fields)
            assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)
            assert answer.json()["error"]["code"] == "invalid_value"
        assert len(served.engine.jobs) == 8


@aio
async def test_defaults_are_the_models_and_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch) as served:
        for body, model, size, steps, scale in (
            ({}, "unet", (64, 32), 25, 7.5),
            ({"model": "dit"}, "dit", (96, 32), 4, 4.0),
            ({"width": 8}, "unet", (8, 32), 25, 7.5),
            ({"height": 8}, "unet", (64, 8), 25, 7.5),
        ):
            answer = (await served.post(**body)).json()
            again = request_of(opened(answer["images"][0]["b64_json"]))
            assert (answer["model"], answer["width"], answer["height"]) == (model, *size)
            assert (again["model"], again["width"], again["height"]) == (model, *size)
            assert (again["num_inference_steps"], again["guidance_scale"]) == (steps, scale)
            assert (again["scheduler"], again["acceleration"], again["timestep_warp"]) == ("ddim", [], 1.0)
            assert not {"negative_prompt", "class_label", "strength", "image_sha256"} & set(again)
            assert answer["acceleration"] == []
            assert answer["images"][0]["seed"] == again["seed"] == served.engine.jobs[-1].run.seeds[0]


@aio
async def test_a_students_file_names_its_own_scale_and_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch) as served:
        answer = await served.post(acceleration={"mode": "cfg_student"})
        again = request_of(opened(answer.json()["images"][0]["b64_json"]))
        assert again["guidance_scale"] == 4.0
        assert again["acceleration"] == [{"mode": "cfg_student", "adapter": "student"}]
        assert answer.json()["acceleration"] == again["acceleration"]
        assert (await served.client.post("/generate", json=again)).status_code == 200


@aio
async def test_a_class_is_repeated_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch, {"classes": class_spec()}) as served:
        answer = await served.post(prompt="", class_label=3)
        assert request_of(opened(answer.json()["images"][0]["b64_json"]))["class_label"] == 3


@aio
async def test_a_stream_in_its_order_with_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch) as served:
        answer = await served.post(stream=True, partial_images=2, **ASKED)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.text)
    pictures = [data.pop("b64_json") for name, data in found if name == "partial_image"]
    job = f"gen-{answer.headers['x-request-id']}"
    assert found[:-1] == [
        ("queued", {"position": 2, "id": job}),
        ("progress", {"step": 1, "total_steps": 9}),
        ("partial_image", {"step": 1, "index": 2}),
        ("progress", {"step": 2, "total_steps": 9}),
        ("partial_image", {"step": 2, "index": 0}),
        ("progress", {"step": 3, "total_steps": 9}),
    ]
    for data, i in zip(pictures, (2, 0), strict=True):
        assert (opened(data).size, colour(opened(data))) == ((24, 40), DIM[i])
        assert request_of(opened(data)) == FACTS | {"seed": 70 + i}
        assert opened(data).text["seed"] == str(70 + i)  # type: ignore[attr-defined]
    name, body = found[-1]
    assert name == "completed"
    check_images(body["images"])
    assert (body["id"], body["usage"], body["timing"]) == (job, USAGE, TIMING)
    assert (body["width"], body["height"], body["acceleration"]) == (24, 40, [DEEPCACHE, GUIDANCE])


@aio
async def test_openais_stream_in_its_order_with_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch) as served:
        answer = await served.post("/v1/images/generations", stream=True, partial_images=2, **ASKED)
    found = events(answer.text)
    assert [name for name, _ in found] == [
        f"image_generation.{kind}" for kind in ["partial_image"] * 2 + ["completed"] * 3
    ]
    for place, (step, i) in enumerate(((1, 2), (2, 0))):
        name, data = found[place]
        assert colour(opened(data.pop("b64_json"))) == DIM[i]
        assert abs(data.pop("created_at") - time.time()) < 60
        shared = {"size": "24x40", "output_format": "png"}
        assert data == {"type": name, "partial_image_index": place, "step": step, **shared}
    completed = [data for _, data in found[2:]]
    check_images(completed)
    for data in completed:
        assert data["type"] == "image_generation.completed"
        assert abs(data["created_at"] - time.time()) < 60
        assert (data["size"], data["width"], data["height"], data["output_format"]) == ("24x40", 24, 40, "png")
        assert (data["usage"], data["timing"], data["model"]) == (USAGE | TOKENS, TIMING, "unet")
        assert not {"data", "images", "created"} & set(data)


@aio
async def test_a_stream_that_fails_ends_with_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch) as served:
        served.engine.script = [Queued(0), Progress(1, 3), Failed(ForwardFailed("it broke", param="prompt"))]
        for path, before in (("/generate", 2), ("/v1/images/generations", 0)):
            answer = await served.post(path, stream=True)
            found = events(answer.text)
            assert answer.status_code == 200
            assert len(found) == before + 1
            error = {"message": "it broke", "type": "server_error", "param": "prompt", "code": "forward_failed"}
            assert found[-1] == ("error", {"error": error})
        facts = {"model": "unet", "acceleration": "none", "outcome": "error"}
        assert served.value("requests_total", endpoint="/generate", **facts) == 1


@aio
async def test_what_nobody_foresaw_in_a_stream_is_in_the_log_as_its_answer_says(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Generation) -> Any:
        raise LookupError("a bug")

    monkeypatch.setattr(Generation, "events", broken)
    monkeypatch.setattr(REQUESTS, "propagate", True)
    async with faked(monkeypatch) as served:
        answer = await served.post(stream=True, headers={"X-Request-Id": "mine"})
    assert events(answer.text)[-1][1]["error"]["code"] == "internal_error"
    [line] = [record for record in caplog.records if record.message == "unforeseen"]
    assert line.exc_info is not None
    assert line.exc_info[0] is LookupError
    assert line.facts == {"request_id": "mine"}  # type: ignore[attr-defined]


@aio
async def test_only_a_stream_is_told_progress_and_previews(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch) as served:
        for stream, asked, previews in ((True, 2, 2), (False, 2, 0), (True, 0, 0)):
            await served.post(stream=stream, partial_images=asked)
            job = served.engine.jobs[-1]
            assert (job.progress, job.previews) == (stream, previews)


def form_error(answer: Any) -> tuple[int, str | None, str]:
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["code"]


def upload(size: tuple[int, int] = (6, 4), tint: tuple[int, int, int] = (9, 8, 7)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, tint).save(out, "PNG")
    return out.getvalue()


async def edit(served: Faked, fields: Mapping[str, Any], *files: tuple[str, bytes]) -> Any:
    parts = [(name, (f"{name}.png", data, "image/png")) for name, data in files]
    return await served.client.post("/v1/images/edits", data=dict(fields), files=parts)


@aio
async def test_every_field_of_a_form_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    form = {
        "prompt": "12",
        "negative_prompt": "null",
        "n": "3",
        "size": "24x40",
        "strength": "0.7",
        "num_inference_steps": "4",
        "seed": "70",
        "timestep_warp": "0.5",
        "scheduler": "dpmpp_2m",
        "stream": "true",
        "partial_images": "1",
        "acceleration[mode]": "depth_skip",
        "acceleration[depth]": "5",
        "user": "me",
    }
    async with faked(monkeypatch) as served:
        for name in ("image", "image[]"):
            answer = await edit(served, form, (name, upload()))
            found = events(answer.text)
            kinds = [kind.removeprefix("image_edit.") for kind, _ in found]
            assert kinds == ["partial_image"] * 2 + ["completed"] * 3
            assert [data["seed"] for _, data in found[2:]] == [70, 71, 72]
            assert (found[-1][1]["size"], found[0][1]["type"]) == ("24x40", "image_edit.partial_image")
        run = served.engine.jobs[-1].run
        request = run.request
        assert (request.prompt, request.negative_prompt, request.strength) == ("12", "null", 0.7)
        assert request.image is not None
        assert (request.image.size, colour(request.image)) == ((24, 40), (9, 8, 7))  # resized by whoever checks it
        assert (run.width, run.height, run.num_inference_steps, run.scheduler) == (24, 40, 4, "dpmpp_2m")
        assert [a.model_dump() for a in run.accelerators] == [{"mode": "depth_skip", "depth": 5}]


@aio
async def test_forms_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    image, form = ("image", upload()), {"prompt": "a ring"}
    async with faked(monkeypatch) as served:
        for fields, files, param in (
            (form, [image, ("image", upload())], "image"),
            (form, [image, ("image[]", upload())], "image[]"),
            (form, [("mask", upload())], "image"),
            (form, [image, ("mask", upload()), ("mask", upload())], "mask"),
            (form, [image, ("control", upload())], "control"),
            ({**form, "acceleration": "3", "acceleration[mode]": "none"}, [image], "acceleration"),
            ({**form, "seed": ["1", "2"]}, [image], "seed"),
            ({**form, "acceleration[mode]": ["none", "none"]}, [image], "acceleration"),
        ):
            assert form_error(await edit(served, fields, *files)) == (422, param, "invalid_value"), (fields, param)
        assert form_error(await edit(served, {}, image)) == (422, "prompt", "missing")
        assert form_error(await edit(served, {**form, "sede": "1"}, image)) == (422, "sede", "unknown_field")
        assert form_error(await served.post("/v1/images/edits")) == (400, None, "malformed")
        plain = await served.client.post("/v1/images/edits", data=form)
        assert form_error(plain) == (400, None, "malformed")
        without = await served.client.post("/v1/images/edits", files={"prompt": (None, "a ring")})
        assert form_error(without) == (422, "image", "invalid_value")
        assert "a file is required" in without.json()["error"]["message"]
        assert not served.engine.jobs


@aio
async def test_what_was_uploaded_is_named_by_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    data = upload()
    async with faked(monkeypatch) as served:
        ours = await served.post(image=base64.b64encode(data).decode(), strength=0.25)
        prefixed = "data:image/png;base64," + base64.b64encode(data).decode()
        again = await served.post("/v1/images/generations", image=prefixed)
        theirs = await edit(served, {"prompt": "a ring", "strength": "0.5"}, ("image", data))
        bodies = (ours.json()["images"], again.json()["data"], theirs.json()["data"])
        for images, strength in zip(bodies, (0.25, 0.8, 0.5), strict=True):
            facts = request_of(opened(images[0]["b64_json"]))
            assert facts["image_sha256"] == hashlib.sha256(data).hexdigest()
            assert facts["strength"] == strength
            assert "image" not in facts


@aio
async def test_models_say_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(
        model="dit", config_hash="h", scheduler="euler", num_inference_steps=2, tokens=48, guidance=False, window=7,
        threshold=0.25, table=(("full",), ("ast",)),
    )  # fmt: skip
    grammar = {"size": ["large", "small"]}
    models = specs()
    models["dit"] = dit_spec(
        1, native_width=96, native_height=32, adapters={}, plans={"fast": plan}, default_steps=4,
        default_scheduler="euler", schedulers=("euler", "ddim"), description="draws", examples=("a ring", "a star"),
        prompt_grammar=grammar,
    )  # fmt: skip
    models["classes"] = class_spec(adapters={})
    async with faked(monkeypatch, models) as served:
        listed = (await served.client.get("/v1/models")).json()
        modes = (await served.client.get("/accelerators")).json()
    assert (listed["object"], modes["object"]) == ("list", "list")
    unet, dit, classes = listed["data"]
    assert abs(unet["created"] - time.time()) < 60
    common = {"object": "model", "created": unet["created"], "owned_by": "slipstream"}
    fits = [mode["mode"] for mode in dit.pop("accelerators")]
    assert fits == [
        "none", "delta_dit", "ditfastattn", "selective_guidance", "forecast",
        "taylorseer", "first_block_cache", "teacache", "magcache",
    ]  # fmt: skip
    assert dit == common | {
        "id": "dit",
        "default": False,
        "aliases": [],
        "description": "draws",
        "family": "dit",
        "layout": "pixart",
        "native_width": 96,
        "native_height": 32,
        "size_multiple": 16,
        "default_num_inference_steps": 4,
        "default_guidance_scale": 4.0,
        "default_scheduler": "euler",
        "schedulers": ["euler", "ddim"],
        "conditioning": "text",
        "num_classes": None,
        "image_to_image": True,
        "inpaints": False,
        "controls": [],
        "edits": False,
        "default_image_guidance_scale": None,
        "adapters": [],
        "plans": [
            {
                "name": "fast",
                "scheduler": "euler",
                "num_inference_steps": 2,
                "tokens": 48,
                "guidance": False,
                "window": 7,
                "threshold": 0.25,
            }
        ],
        "profiles": [],
        "examples": ["a ring", "a star"],
        "prompt_grammar": grammar,
        "max_rows": 6,
    }
    assert (unet["id"], unet["default"], unet["max_rows"], unet["size_multiple"]) == ("unet", True, 5, 8)
    assert (unet["family"], unet["layout"], unet["default_guidance_scale"]) == ("unet", "sd", 7.5)
    student = {
        "name": "student",
        "kind": "student",
        "guidance_scale": 4.0,
        "rank": 4,
        "parameters": 100,
        "negative_prompt": "",
    }
    assert unet["adapters"] == [student]
    assert [a["mode"] for a in unet["accelerators"]] == [
        "none", "deepcache", "cfg_student", "depth_skip", "selective_guidance", "forecast", "adaptive_deepcache",
    ]  # fmt: skip
    assert [a["models"] for a in unet["accelerators"]] == [["unet"]] * 7
    assert (classes["conditioning"], classes["num_classes"], classes["image_to_image"]) == ("class", 10, False)
    assert {mode["mode"]: (mode["models"], mode["families"]) for mode in modes["data"]} == {
        "none": (["unet", "dit", "classes"], ["unet", "dit"]),
        "auto": ([], ["unet", "dit"]),
        "deepcache": (["unet"], ["unet"]),
        "delta_dit": (["dit", "classes"], ["dit"]),
        "ditfastattn": (["dit"], ["dit"]),
        "cfg_student": (["unet"], ["unet", "dit"]),
        "depth_skip": (["unet"], ["unet"]),
        "selective_guidance": (["unet", "dit", "classes"], ["unet", "dit"]),
        "forecast": (["unet", "dit", "classes"], ["unet", "dit"]),
        "taylorseer": (["dit", "classes"], ["dit"]),
        "first_block_cache": (["dit", "classes"], ["dit"]),
        "teacache": (["dit", "classes"], ["dit"]),
        "magcache": (["dit", "classes"], ["dit"]),
        "adaptive_deepcache": (["unet"], ["unet"]),
    }
    deepcache = next(mode for mode in modes["data"] if mode["mode"] == "deepcache")
    assert deepcache["paper"] == "https://arxiv.org/abs/2312.00858"
    assert deepcache["title"].startswith("Between full steps, run only the outer levels")
    assert deepcache["parameters"]["properties"]["interval"]["maximum"] == 1000


@aio
async def test_previews_of_one_image_are_counted_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch) as served:
        answer = await served.post("/v1/images/generations", stream=True, partial_images=2, output_format="jpeg")
        data = [data for name, data in events(answer.text) if name == "image_generation.partial_image"]
        assert [(one["partial_image_index"], one["output_format"]) for one in data] == [(0, "jpeg"), (1, "jpeg")]
        assert opened(data[0]["b64_json"]).format == "JPEG"


@aio
async def test_the_description_names_the_events_of_each_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch) as served:
        paths = (await served.client.get("/openapi.json")).json()["paths"]
    for path, names in (
        ("/generate", ["queued", "progress", "partial_image", "completed", "error"]),
        ("/v1/images/generations", ["image_generation.partial_image", "image_generation.completed", "error"]),
        ("/v1/images/edits", ["image_edit.partial_image", "image_edit.completed", "error"]),
    ):
        content = paths[path]["post"]["responses"]["200"]["content"]
        assert content["text/event-stream"]["schema"]["properties"]["event"]["enum"] == names
        assert ("image/png" in content) == (path == "/generate")
