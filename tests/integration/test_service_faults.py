"""Things that go wrong, made to happen through the real app: each hurts whom it must, and nobody else."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from app.engine import decoder, worker
from app.http.main import create_app
from app.logs import configure
from app.serve import Server
from app.settings import Settings
from models import Backbone, Request
from models.accelerators import DeepCache
from models.generate import decode
from models.resolve import resolve
from models.reuse.rows import Row
from models.trajectory import Trajectory
from tests.serving import aio, hooked, pixels, serving, slowed, until

Model = Callable[..., Backbone]


class Trouble:
    """Raises once it is armed."""

    def __init__(self, error: type[Exception] = RuntimeError, message: str = "broken") -> None:
        self.armed = 0
        self.most_rows = 10_000
        self._error, self._message = error, message

    def __call__(self, rows: Sequence[Row]) -> None:
        if self.armed > 0 and len(rows) > (0 if self.most_rows == 10_000 else self.most_rows):
            self.armed -= 1
            raise self._error(self._message)


@aio
async def test_an_image_that_the_model_fails_on_fails_alone(student_of: Model) -> None:
    """Its neighbours of other accelerations, steps and numbers of images get the pictures that they get alone."""
    poison = threading.Event()

    def before(rows: Sequence[Row]) -> None:
        if poison.is_set() and any(row.owner.scales.guidance == 6.5 for row in rows):  # type: ignore[attr-defined]
            raise RuntimeError("broken")

    bodies: list[dict[str, Any]] = [
        {"seed": 1, "num_inference_steps": 20},
        {"seed": 2, "num_inference_steps": 15, "acceleration": {"mode": "deepcache", "interval": 3}},
        {"seed": 3, "num_inference_steps": 12, "num_images": 2, "acceleration": {"mode": "cfg_student"}},
    ]
    async with serving({"sd": slowed(hooked(student_of("sd"), before), 0.01)}, max_rows=16) as served:
        alone = [(await served.post(**body)).json() for body in bodies]
        good = [asyncio.ensure_future(served.post(**body)) for body in bodies]
        bad = asyncio.ensure_future(served.post(guidance_scale=6.5, num_inference_steps=50, num_images=2))
        streamed = asyncio.ensure_future(served.post(guidance_scale=6.5, num_inference_steps=50, stream=True))
        await served.until(lambda: served.value("requests_running") == 5)
        poison.set()
        answer = await bad
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "forward_failed")
        assert "broken" not in answer.text
        assert "forward_failed" in (await streamed).text
        for post, expected in zip(good, alone, strict=True):
            answer = await post
            assert answer.status_code == 200, answer.text
            for i in range(len(expected["images"])):
                assert abs(pixels(answer.json(), i) - pixels(expected, i)).max() <= 2
        assert served.engine.ready
        assert served.engine.jobs == 0
        assert served.value("feature_memory_bytes", model="sd") == 0


@aio
async def test_a_forward_that_raises_once_costs_nobody_anything(student_of: Model) -> None:
    trouble = Trouble()
    async with serving({"sd": slowed(hooked(student_of("sd"), trouble), 0.01)}) as served:
        running = [asyncio.ensure_future(served.post(num_inference_steps=30, seed=i)) for i in range(3)]
        await served.until(lambda: served.value("requests_running") == 3)
        trouble.armed = 1
        assert [(await post).status_code for post in running] == [200] * 3
        assert trouble.armed == 0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_halves_the_tick_before_it_fails_anyone(student_of: Model, error: type[Exception]) -> None:
    @aio
    async def test() -> None:
        trouble = Trouble(error, "no memory")
        trouble.most_rows = 4
        async with serving({"sd": slowed(hooked(student_of("sd"), trouble), 0.01)}) as served:
            bodies: list[dict[str, Any]] = [
                {"seed": i, "num_inference_steps": 12, "acceleration": {"mode": "deepcache"}} for i in range(4)
            ]
            alone = [(await served.post(**body)).json() for body in bodies]
            trouble.armed = 1_000
            answers = await asyncio.gather(*(served.post(**body) for body in bodies))
            assert [answer.status_code for answer in answers] == [200] * 4
            for answer, expected in zip(answers, alone, strict=True):
                assert abs(pixels(answer.json()) - pixels(expected)).max() <= 2
            assert 1 <= served.value("out_of_memory_total") <= 3, "the group's cap is lowered"
            trouble.most_rows = 0
            answer = await served.post()
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "out_of_memory"
            assert student_of("sd").prompt_cache_bytes == 0, "what can be made again is let go"
            trouble.armed = 0
            assert (await served.post()).status_code == 200
            assert student_of("sd").prompt_cache_bytes > 0
            assert served.value("prompt_cache_bytes") == student_of("sd").prompt_cache_bytes

    test()


@aio
async def test_non_finite_latents_fail_alone(student_of: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trajectory.moved

    def moved(self: Trajectory, state: torch.Tensor) -> None:
        original(self, state * float("nan") if self.scales.guidance == 6.5 else state)

    monkeypatch.setattr(Trajectory, "moved", moved)
    async with serving({"sd": student_of("sd")}) as served:
        bad, *good = await asyncio.gather(
            served.post(guidance_scale=6.5, num_images=2), *(served.post(seed=i) for i in range(3))
        )
        assert bad.status_code == 500
        assert bad.json()["error"]["code"] == "non_finite"
        assert [answer.status_code for answer in good] == [200] * 3
        assert served.engine.jobs == 0


@aio
async def test_a_dead_engine_turns_readiness_red_and_answers_everyone(
    student_of: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving({"sd": slowed(student_of("sd"), 0.02)}) as served:
        running = [asyncio.ensure_future(served.post(num_inference_steps=100, stream=s)) for s in (False, True)]
        await served.until(lambda: served.value("requests_running") == 2)

        def die(self: object, lanes: object) -> None:
            raise LookupError("a bug")

        monkeypatch.setattr(worker.Worker, "_after", die)
        answers = await asyncio.gather(*running)
        assert answers[0].status_code == 503
        assert '"engine_dead"' in answers[1].text
        ready = await served.client.get("/health/ready")
        assert ready.status_code == 503
        assert ready.json()["error"]["code"] == "engine_dead"
        assert (await served.client.get("/health/live")).status_code == 200
        assert (await served.post()).status_code == 503
        assert served.value("ready") == 0
        assert isinstance(served.engine.failure, LookupError)


@pytest.mark.parametrize("poison", [False, True])
def test_a_dead_engine_ends_the_server_after_its_answers(
    student_of: Model, monkeypatch: pytest.MonkeyPatch, poison: bool
) -> None:
    """By a bug of ours, or by a kernel that takes the device along: that forward is not tried again."""
    tried: list[int] = []

    def before(rows: Sequence[Row]) -> None:
        if poison and server.engine.ready:
            tried.append(len(rows))
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    settings = Settings(port=0, model=("sd",), max_rows=4, torch_threads=1)
    server = Server(create_app(settings, {"sd": hooked(student_of("sd"), before)}), settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started or not server.engine.ready:
        assert time.monotonic() < deadline
        time.sleep(0.02)

    def die(self: object, lanes: object) -> None:
        raise LookupError("a bug")

    monkeypatch.setattr(worker.Worker, "_after", die)
    body = {"prompt": "a star", "num_inference_steps": 2, "num_images": 2}
    answer = httpx.post(f"{server.address}/generate", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
    thread.join(30)
    assert not thread.is_alive()
    assert server.exit_code == 1
    assert tried == [4] * poison


@aio
async def test_a_picture_that_cannot_be_decoded_fails_its_request_only(
    student_of: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A size that has no room, and one picture beside two others of its own size."""
    original, finished = decode, list[torch.Tensor]()

    def watched(backbone: Backbone, latents: Sequence[torch.Tensor]) -> Any:
        finished.extend(latents)
        return original(backbone, latents)

    def broken(backbone: Backbone, latents: Sequence[torch.Tensor]) -> Any:
        bad = finished[1]
        if any(one.shape != bad.shape or torch.allclose(one, bad, atol=1e-3) for one in latents):
            raise RuntimeError("broken")
        return original(backbone, latents)

    async with serving({"sd": student_of("sd")}, max_rows=16) as served:
        monkeypatch.setattr(decoder, "decode", watched)
        alone = [(await served.post(seed=seed)).json() for seed in (1, 2, 3)]
        monkeypatch.setattr(decoder, "decode", broken)
        small, *others = await asyncio.gather(
            served.post(width=16, height=16), *(served.post(seed=seed) for seed in (1, 2, 3))
        )
        assert [answer.status_code for answer in (small, *others)] == [500, 200, 500, 200]
        assert [answer.json()["error"]["code"] for answer in (small, others[1])] == ["forward_failed"] * 2
        for i in (0, 2):
            assert abs(pixels(others[i].json()) - pixels(alone[i])).max() <= 2


@aio
async def test_requests_are_answered_with_the_disk_full(student_of: Model) -> None:
    loggers = [logging.getLogger(name) for name in ("slipstream", "uvicorn", "py.warnings")]
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in loggers]
    handler = configure(Settings(log_file=Path("/dev/full"), log_format="json"))
    try:
        async with serving({"sd": student_of("sd")}) as served:
            assert (await served.post()).status_code == 200
            assert (await served.post(model="nope")).status_code == 404
        handler.flush()
        assert handler.lost >= 2
    finally:
        logging.captureWarnings(False)
        for logger, handlers, propagate, level in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
        handler.close()
        handler.stream.close()


@aio
async def test_features_above_their_limit_hold_new_images_back(student_of: Model) -> None:
    seen: list[int] = []
    backbone = slowed(hooked(student_of("sd"), lambda rows: seen.append(len(rows))), 0.01)
    async with serving({"sd": backbone}, max_feature_bytes=1) as served:
        body: dict[str, Any] = {"num_inference_steps": 9, "acceleration": {"mode": "deepcache"}}
        seen.clear()
        first = asyncio.ensure_future(served.post(**body))
        await served.until(lambda: served.value("feature_memory_bytes", model="sd") > 0)
        others = [asyncio.ensure_future(served.post(seed=i, **body)) for i in range(3)]
        answers = await asyncio.gather(first, *others)
        assert [answer.status_code for answer in answers] == [200] * 4
        assert served.value("feature_memory_bytes", model="sd") == 0
    assert seen == [2] * 36


@aio
async def test_a_first_wave_of_unseen_kinds_is_held_to_the_budget(student_of: Model) -> None:
    """Kinds that nobody has asked for before, several images each: what they need is known before they start."""
    held: list[int] = []
    backbone = student_of("sd")
    watched = hooked(backbone, lambda rows: held.append(watched.features.nbytes))
    bodies: list[dict[str, Any]] = [
        {"num_images": 3, "acceleration": {"mode": "deepcache", "interval": 3}},
        {"num_images": 1, "acceleration": {"mode": "deepcache", "interval": 4, "branch": 1}},
        {"num_images": 2, "acceleration": {"mode": "deepcache"}, "width": 48, "height": 32},
        {"num_images": 2, "acceleration": {"mode": "deepcache", "interval": 5}, "guidance_scale": 1.0},
        {"num_images": 3, "acceleration": {"mode": "deepcache", "interval": 6}, "scheduler": "euler"},
    ]

    def need(body: dict[str, Any]) -> int:
        cache = DeepCache.model_validate(body["acceleration"])
        request = Request(prompt="", num_inference_steps=9, **body | {"acceleration": cache})
        return resolve(backbone.spec, backbone.scheduler_config, request).feature_bytes * request.num_images

    needs = [need(body) for body in bodies]
    limit = max(needs) + min(needs)
    assert sum(needs) > 2 * limit
    async with serving({"sd": watched}, max_feature_bytes=limit, max_rows=64) as served:
        held.clear()
        answers = await asyncio.gather(*(served.post(num_inference_steps=9, **body) for body in bodies))
        assert [answer.status_code for answer in answers] == [200] * len(bodies)
        assert 0 < max(held) <= limit
        assert served.value("feature_memory_bytes", model="sd") == 0


@aio
async def test_loading_and_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    app = create_app(Settings(model=(str(tmp_path),)))
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        loading = await client.post("/generate", json={"prompt": ""})
        assert (loading.status_code, loading.json()["error"]["code"]) == (503, "loading")
        assert loading.headers["retry-after"]
        async with app.router.lifespan_context(app):
            await until(lambda: app.state.engine.state != "loading")
            assert (await client.get("/v1/models")).status_code == 503
            assert "model_index.json" in str(app.state.engine.failure)
