"""From a body to a job: limits at their edge, what the library is asked for, and how a request that ends is counted."""

from __future__ import annotations

import asyncio
import base64
import io
import re
from typing import Any

import pytest
from PIL import Image

from app.engine.job import Failed, Finished, Queued
from app.errors import ClientGone, DeadlineExceeded, Draining, ForwardFailed, QueueFull
from app.http import service
from app.http.generation import Generation
from app.http.record import Record
from app.http.schemas.requests import GenerationRequest
from models.costs.macs import Usage
from tests.faked import Faked, faked
from tests.serving import aio, events

LIMITS: dict[str, Any] = {
    "max_steps": 20,
    "max_images": 3,
    "deadline_seconds": 9.5,
    "max_prompt_length": 12,
    "max_pixels": 64 * 48,
    "max_image_pixels": 10 * 8,
}


def as_base64(picture: Image.Image) -> str:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def upload(width: int, height: int) -> str:
    return as_base64(Image.new("RGB", (width, height)))


@pytest.mark.parametrize(
    ("param", "most", "above", "words"),
    [
        ("num_inference_steps", {"num_inference_steps": 20}, {"num_inference_steps": 21}, "21 is more than .* 20"),
        ("num_images", {"num_images": 3}, {"num_images": 4}, "4 is more than .* 3"),
        ("timeout_seconds", {"timeout_seconds": 9.5}, {"timeout_seconds": 9.6}, "9.6 is more than .* 9.5"),
        ("prompt", {"prompt": "x" * 12}, {"prompt": "x" * 13}, "13 characters are more than .* 12"),
        ("prompt", {"prompt": "\N{SNOWMAN}" * 12}, {"prompt": "\N{SNOWMAN}" * 13}, "13 characters"),
        ("negative_prompt", {"negative_prompt": "x" * 12}, {"negative_prompt": "x" * 13}, "13 characters"),
        ("width", {"width": 64, "height": 48}, {"width": 64, "height": 56}, "64x56 is more than .* 3072 pixels"),
        ("height", {"height": 48}, {"height": 56}, "64x56 is more than"),
        ("width", {"width": 96}, {"width": 104}, "104x32 is more than"),
        ("image", {"image": upload(10, 8)}, {"image": upload(10, 9)}, "10x9 is more than 80 pixels"),
    ],
)
def test_the_limit_itself_is_allowed_and_one_above_is_not(
    monkeypatch: pytest.MonkeyPatch, param: str, most: dict[str, Any], above: dict[str, Any], words: str
) -> None:
    @aio
    async def test() -> None:
        async with faked(monkeypatch, **LIMITS) as served:
            assert (await served.post(**most)).status_code == 200
            answer = await served.post(**above)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (422, param, "invalid_value")
            assert re.search(words, error["message"]), error["message"]
            assert len(served.engine.jobs) == 1

    test()


@aio
async def test_without_a_limit_of_pixels_four_times_the_native_size_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with faked(monkeypatch) as served:
        assert (await served.post(width=128, height=64)).status_code == 200
        assert await served.refused(width=128, height=72) == (422, "width", "invalid_value")
        assert (await served.post(height=128)).status_code == 200
        assert await served.refused(height=136) == (422, "height", "invalid_value")
        assert (await served.post(width=256)).status_code == 200
        assert await served.refused(width=264) == (422, "width", "invalid_value")


@aio
async def test_a_body_may_be_as_large_as_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    start, end = b'{"prompt": "', b'"}'

    async def parts(body: bytes) -> Any:
        for at in range(0, len(body), 700):
            yield body[at : at + 700]

    async with faked(monkeypatch, max_body_bytes=2048) as served:
        for size, status in ((2048, 200), (2049, 413)):
            body = start + b"x" * (size - len(start) - len(end)) + end
            for content in (body, parts(body)):
                answer = await served.client.post(
                    "/generate", content=content, headers={"Content-Type": "application/json"}
                )
                assert answer.status_code == status, (size, answer.text)
                if status == 413:
                    assert answer.json()["error"]["code"] == "body_too_large"
        form = {"prompt": "a ring", "user": "x" * 400}
        answer = await served.client.post("/v1/images/edits", data=form, files={"image": b"x" * 1700})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert len(served.engine.jobs) == 2


@aio
async def test_the_library_is_asked_for_what_the_client_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {
        "prompt": "a ring",
        "negative_prompt": "dull",
        "width": 24,
        "height": 40,
        "num_inference_steps": 7,
        "guidance_scale": 2.5,
        "seed": 70,
        "num_images": 3,
        "scheduler": "dpmpp_2m",
        "strength": 0.6,
        "timestep_warp": 0.5,
    }
    async with faked(monkeypatch) as served:
        started = Image.linear_gradient("L").rotate(30).resize((6, 4)).convert("RGB")
        await served.post(image=as_base64(started), **asked)
        job = served.engine.jobs[0]
        assert {name: getattr(job.run.request, name) for name in asked} == asked
        assert job.run.request.image is not None
        assert job.run.request.image.tobytes() == started.resize((24, 40), Image.Resampling.LANCZOS).tobytes()
        assert (job.model, job.run.seeds, job.acceleration) == ("unet", (70, 71, 72), "none")
        await served.post()
        assert served.engine.jobs[1].run.request.image is None
        await served.post(acceleration=[{"mode": "selective_guidance"}, {"mode": "none"}, {"mode": "deepcache"}])
        assert served.engine.jobs[2].acceleration == "deepcache+selective_guidance"


@aio
async def test_a_seed_that_nobody_gave_is_any_of_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch) as served:
        answers = [(await served.post()).json()["images"][0]["seed"] for _ in range(40)]
        assert answers == [job.run.seeds[0] for job in served.engine.jobs]
        assert len(set(answers)) == 40
        assert all(0 <= seed < 2**32 for seed in answers)
        assert max(answers) >= 2**30, "all 40 below a quarter of the range: one in 10^24"
        assert len({seed % 16 for seed in answers}) > 4
        assert (await served.post(seed=0)).json()["images"][0]["seed"] == 0


@aio
async def test_models_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch) as served:
        assert (await served.post()).json()["model"] == "unet"
        assert (await served.post(model="dit")).json()["model"] == "dit"
        assert await served.refused(model="shapes") == (404, "model", "model_not_found")
        assert await served.refused(model="") == (404, "model", "model_not_found")
        answer = await served.post(model="shapes")
        assert answer.json()["error"]["message"] == "model: 'shapes' is not served; one of unet, dit"
        assert (served.service.model(None), served.service.model("dit")) == ("unet", "dit")


@aio
async def test_requests_are_counted_by_what_they_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(endpoint: str, model: str, acceleration: str, outcome: str) -> float:
        labels = {"model": model, "acceleration": acceleration, "outcome": outcome}
        return served.value("requests_total", endpoint=endpoint, **labels)

    async with faked(monkeypatch) as served:
        await served.post(acceleration=[{"mode": "selective_guidance"}, {"mode": "deepcache"}], num_images=2)
        assert counted("/generate", "unet", "deepcache+selective_guidance", "ok") == 1
        await served.post("/v1/images/generations", model="dit", acceleration={"mode": "none"})
        assert counted("/v1/images/generations", "dit", "none", "ok") == 1
        await served.post(acceleration={"mode": "delta_dit"})
        assert counted("/generate", "unet", "delta_dit", "invalid") == 1
        await served.post(model="nope", acceleration={"mode": "deepcache"})
        assert counted("/generate", "unknown", "unknown", "invalid") == 1
        await served.post(nope=1)
        assert counted("/generate", "unknown", "unknown", "invalid") == 2
        assert served.value("images_total", model="unet") == 2
        assert served.value("images_total", model="dit") == 1
        assert served.value("macs_total", model="unet", kind="computed") == 1000
        assert served.value("macs_total", model="unet", kind="saved") == 3500
        for stage, seconds in (("denoise", 7.0), ("decode", 0.5)):
            assert served.value("stage_duration_seconds_count", stage=stage) == 2
            assert served.value("stage_duration_seconds_sum", stage=stage) == seconds
        assert served.value("stage_duration_seconds_count", stage="serialize") == 2
        assert 0 < served.value("stage_duration_seconds_sum", stage="serialize") < 60
        await served.client.get("/v1/models")
        await served.client.get("/generate")
        labels = {"model": "unknown", "acceleration": "unknown", "outcome": "invalid"}
        assert served.value("request_duration_seconds_count", **labels) == 2


@aio
async def test_who_is_refused_is_counted_by_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch) as served:
        for error in (Draining("bye", retry_after=3), QueueFull("full", retry_after=7)):
            served.engine.refusal = error
            answer = await served.post()
            assert (answer.status_code, answer.headers["retry-after"]) == (error.status, str(error.retry_after))
            assert served.value("requests_rejected_total", reason=error.code) == 1
            facts = {"model": "unknown", "acceleration": "unknown", "outcome": "rejected"}
        assert served.value("requests_total", endpoint="/generate", **facts) == 2
        served.engine.refusal = None
        await served.post(num_images=999)
        assert served.value("requests_rejected_total", reason="invalid_value") == 0


async def opened(served: Faked, **asked: Any) -> Generation:
    request = GenerationRequest.model_validate({"prompt": "a ring"} | asked)
    return await served.service.open(request, Record("id"))


@aio
async def test_deadlines_are_the_clients_or_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch, deadline_seconds=500.0) as served:
        for asked, seconds in (({}, 500.0), ({"timeout_seconds": 20.0}, 20.0), ({"timeout_seconds": 500.0}, 500.0)):
            generation = await opened(served, **asked)
            left = generation.deadline - asyncio.get_running_loop().time()
            assert seconds - 5 < left <= seconds
            generation.leave()


@aio
async def test_a_deadline_that_passes_names_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch) as served:
        served.engine.script = [Queued(0)]
        answer = await served.post(timeout_seconds=0.01)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (504, "timeout_seconds", "deadline_exceeded")
        assert error["type"] == "timeout_error"
        assert served.engine.cancelled == served.engine.jobs


@pytest.mark.parametrize(
    ("error", "cause", "outcome"),
    [
        (DeadlineExceeded("late"), "deadline", "ok"),
        (ClientGone("left"), "client", "cancelled"),
        (None, "client", "cancelled"),
        (asyncio.CancelledError(), "client", "cancelled"),
        (Draining("bye"), "shutdown", "ok"),
        (ForwardFailed("broke"), None, "ok"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_who_leaves_early_is_given_up_and_counted_by_the_cause(
    monkeypatch: pytest.MonkeyPatch, error: BaseException | None, cause: str | None, outcome: str
) -> None:
    @aio
    async def test() -> None:
        async with faked(monkeypatch) as served:
            served.engine.script = [Queued(0)]
            generation = await opened(served)
            generation.leave(error)
            assert served.engine.cancelled == served.engine.jobs
            assert generation.record.outcome == outcome
            counted = {c: served.value("requests_cancelled_total", cause=c) for c in ("deadline", "client", "shutdown")}
            assert counted == {c: float(c == cause) for c in counted}

    test()


@aio
async def test_who_leaves_with_its_images_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch) as served:
        generation = await opened(served)
        assert [type(event) async for event in generation.events()] == [Queued, Finished]
        generation.leave()
        assert not served.engine.cancelled
        assert served.value("requests_cancelled_total", cause="client") == 0
        assert generation.record.outcome == "ok"


@aio
async def test_nothing_can_be_had_of_what_has_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch) as served:
        generation = await opened(served)
        with pytest.raises(RuntimeError, match="wait for the generation"):
            await generation.files()
        generation.leave()


@aio
async def test_what_costs_more_than_plain_saves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch) as served:
        monkeypatch.setattr(service, "usage", lambda backbone, run, ran: Usage(3, 6, 1200, 1000, 3))
        assert (await served.post()).status_code == 200
        assert served.value("macs_total", model="unet", kind="computed") == 1200
        assert served.value("macs_total", model="unet", kind="saved") == 0


@aio
async def test_what_cannot_be_counted_keeps_no_picture_from_its_client(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As JSON, as OpenAI's, as bytes and as a stream: the steps and rows of two guided images, and no MACs."""

    def broken(backbone: object, run: object, ran: object) -> None:
        raise ZeroDivisionError("secret")

    body: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0}
    wanted = {"steps": 4, "evaluations": 4, "rows": 16, "macs": None, "macs_unaccelerated": None}
    async with faked(monkeypatch) as served:
        monkeypatch.setattr(service, "usage", broken)
        ours = await served.post(**body, num_images=2)
        assert (ours.status_code, ours.json()["usage"]) == (200, wanted)
        assert len(ours.json()["images"]) == 2
        openai = await served.post("/v1/images/generations", n=2, **body)
        assert openai.status_code == 200
        assert openai.json()["usage"].items() >= wanted.items()
        picture = await served.post(headers={"Accept": "image/png"}, **body)
        assert (picture.status_code, picture.headers["content-type"]) == (200, "image/png")
        facts = {name: picture.headers.get(f"x-slipstream-{name}") for name in ("steps", "rows", "evaluations", "macs")}
        assert facts == {"steps": "4", "rows": "8", "evaluations": "4", "macs": None}
        assert "x-slipstream-macs-unaccelerated" not in picture.headers
        stream = await served.post(**body, num_images=2, stream=True)
        [(_, done)] = [event for event in events(stream.text) if event[0] == "completed"]
        assert done["usage"] == wanted
        assert served.value("macs_total", model="unet", kind="computed") == 0
        assert served.value("images_total", model="unet") == 7
        schema = (await served.client.get("/openapi.json")).json()["components"]["schemas"]["UsageBody"]
        assert {kind["type"] for kind in schema["properties"]["macs"]["anyOf"]} == {"integer", "null"}
        assert set(schema["required"]) == set(wanted)
    logged = [record for record in caplog.records if "MACs" in record.message]
    assert len(logged) == 4, "once a request"


@aio
async def test_what_the_job_failed_with_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch) as served:
        served.engine.script = [Queued(0), Failed(ForwardFailed("it broke"))]
        assert await served.refused() == (500, None, "forward_failed")
        facts = {"model": "unet", "acceleration": "none", "outcome": "error"}
        assert served.value("requests_total", endpoint="/generate", **facts) == 1
        assert served.value("images_total", model="unet") == 0


@aio
async def test_a_side_that_its_format_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch, max_pixels=10**7) as served:
        wide: dict[str, Any] = {"width": 16_384, "height": 64, "output_format": "webp"}
        assert await served.refused(**wide) == (422, "width", "invalid_value")
        assert await served.refused(**wide | {"width": 64, "height": 16_384}) == (422, "height", "invalid_value")
        assert await served.refused(**wide | {"width": 65_504, "output_format": "jpeg"}) == (
            422,
            "width",
            "invalid_value",
        )
        assert (await served.post(**wide | {"width": 16_376})).status_code == 200
        assert (await served.post(**wide | {"output_format": "png"})).status_code == 200


@aio
async def test_a_models_default_of_steps_goes_as_far_as_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch, max_steps=3) as served:
        assert (await served.post(model="unet")).status_code == 200
        assert served.engine.jobs[0].run.num_inference_steps == 3
    async with faked(monkeypatch) as served:
        assert (await served.post(model="dit")).status_code == 200
        assert served.engine.jobs[0].run.num_inference_steps == 4


@pytest.mark.parametrize("stream", [False, True])
@aio
async def test_who_leaves_in_the_very_turn_in_which_it_is_accepted_is_given_up(
    monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    async with faked(monkeypatch) as served:
        served.engine.script = [Queued(0)]
        wait = asyncio.wait

        async def cancelled(tasks: Any, **options: Any) -> Any:
            """The work is done, and whoever waits for it is told of its own end and not of that."""
            await wait(tasks, **options)
            raise asyncio.CancelledError

        monkeypatch.setattr(asyncio, "wait", cancelled)
        with pytest.raises(asyncio.CancelledError):
            await served.post(stream=stream)
        assert len(served.engine.jobs) == 1
        assert served.engine.cancelled == served.engine.jobs
        assert served.value("waiting_bytes") == 0
