"""A request from its handler's side, on a model without a network: how it ends is what happens to its work."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from app.engine.job import Finished, Queued
from app.errors import (
    ClientGone,
    DeadlineExceeded,
    Draining,
    EngineDead,
    ForwardFailed,
    OutOfMemory,
    QueueFull,
)
from app.http.generation import Generation, Mailbox
from app.http.main import create_app
from app.http.record import Record
from app.http.schemas.requests import GenerationRequest
from app.http.service import Service
from app.settings import Settings
from models.accelerators import DeepCache
from tests.serving import Served, aio, serving, until
from tests.unit.fakes import FakeBackbone, grey

PATIENCE = 20.0


class Held:
    """A served model whose forwards wait while it is held; `forwards` have begun."""

    def __init__(self, served: Served, backbone: FakeBackbone) -> None:
        self.served, self.backbone = served, backbone
        self.service: Service = served.app.state.service
        self.record = Record("id")
        self._free = threading.Event()
        self.forwards = 0
        backbone.ticks.clear()
        backbone.before = self._wait

    def _wait(self, seeds: list[int]) -> None:
        self.forwards += 1
        assert self._free.wait(PATIENCE)

    async def running(self) -> None:
        """Until a forward stands still."""
        await until(lambda: self.forwards == 1)

    def free(self) -> None:
        """Let all forwards through."""
        self._free.set()

    async def open(self, **body: Any) -> Generation:
        """A generation, opened as a route does."""
        fields: dict[str, Any] = {"prompt": "a ring", "num_inference_steps": 3, "guidance_scale": 1.0, **body}
        self.record.arrived = time.monotonic()
        return await self.service.open(GenerationRequest(**fields), self.record)

    async def ticks(self) -> list[list[int]]:
        """All ticks that are ever run, once they may."""
        self.free()
        await until(lambda: self.served.engine.jobs == 0)
        marker = await self.open(seed=99, num_inference_steps=1)
        await marker.result()
        marker.leave()
        return self.backbone.ticks[:-1]

    def cancelled(self) -> dict[str, float]:
        """Requests given up, by cause."""
        causes = ("client", "deadline", "shutdown")
        counts = {cause: self.served.value("requests_cancelled_total", cause=cause) for cause in causes}
        assert self.served.total("requests_cancelled_total") == sum(counts.values())
        return {cause: count for cause, count in counts.items() if count}


@asynccontextmanager
async def held(**settings: Any) -> AsyncIterator[Held]:
    """A server on the fake, its forwards held."""
    backbone = FakeBackbone()
    async with serving({"unet": backbone.real}, **settings) as served:
        found = Held(served, backbone)
        try:
            yield found
        finally:
            found.free()


@aio
async def test_every_event_up_to_the_pictures() -> None:
    async with held() as it:
        it.free()
        generation = await it.open(seed=40, num_images=2, stream=True)
        seen = [event async for event in generation.events()]
        assert seen[0] == Queued(0)
        assert seen[-1] is generation.finished
        assert isinstance(seen[-1], Finished)
        assert [grey(image) for image in seen[-1].images] == [40, 41]
        assert len(seen) == 5
        generation.leave()
        assert it.cancelled() == {}
        assert it.record.outcome == "ok"


@aio
async def test_a_passed_deadline_ends_the_work_too() -> None:
    async with held() as it:
        generation = await it.open(seed=1, timeout_seconds=0.02, acceleration=DeepCache(interval=3))
        await it.running()
        with pytest.raises(DeadlineExceeded) as raised:
            await generation.result()
        assert raised.value.param == "timeout_seconds"
        assert it.served.engine.jobs == 1
        generation.leave(raised.value)
        assert await it.ticks() == [[1]]  # the one that ran when the deadline passed
        assert it.cancelled() == {"deadline": 1}
        assert it.served.value("feature_memory_bytes", model="unet") == 0
        assert it.record.outcome == "ok", "the route says what it was answered with"


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_over_http_ends_the_work_too(stream: bool) -> None:
    @aio
    async def test() -> None:
        async with held() as it:
            answer = await it.served.post(
                seed=1, timeout_seconds=0.05, num_inference_steps=3, guidance_scale=1.0, stream=stream
            )
            assert answer.status_code == (200 if stream else 504)
            assert '"deadline_exceeded"' in answer.text
            assert it.cancelled() == {"deadline": 1}
            assert await it.ticks() in ([], [[1]])

    test()


@aio
async def test_the_deadline_is_the_servers_where_none_is_asked_for() -> None:
    async with held(deadline_seconds=0.02) as it:
        generation = await it.open()
        with pytest.raises(DeadlineExceeded):
            await generation.result()
        generation.leave(DeadlineExceeded("late"))
        it.free()
    async with held(deadline_seconds=500.0) as it:
        now = asyncio.get_running_loop().time()
        mine, theirs = await it.open(timeout_seconds=50.0), await it.open()
        assert 49.9 < mine.deadline - now < 60
        assert 499.9 < theirs.deadline - now < 510
        for generation in (mine, theirs):
            generation.leave()


@pytest.mark.parametrize(
    ("error", "cause", "outcome"),
    [
        (None, "client", "cancelled"),
        (ClientGone("left"), "client", "cancelled"),
        (asyncio.CancelledError(), "client", "cancelled"),
        (ValueError("a bug of the route's"), "client", "cancelled"),
        (DeadlineExceeded("late"), "deadline", "ok"),
        (Draining("cut off"), "shutdown", "ok"),
        (EngineDead("a bug"), "shutdown", "ok"),
        (ForwardFailed("a bug"), None, "ok"),
        (OutOfMemory("full"), None, "ok"),
        (QueueFull("full"), None, "ok"),
    ],
)
def test_who_leaves_before_the_end_is_counted_by_cause(
    error: BaseException | None, cause: str | None, outcome: str
) -> None:
    @aio
    async def test() -> None:
        async with held() as it:
            generation = await it.open(seed=1)
            await it.running()
            generation.leave(error)
            assert it.cancelled() == ({} if cause is None else {cause: 1})
            assert (it.record.outcome, it.record.status) == (outcome, 499 if outcome == "cancelled" else 0)
            await asyncio.sleep(0)
            assert generation.costs.done()
            assert await it.ticks() == [[1]]

    test()


@aio
async def test_who_leaves_with_the_pictures_has_not_given_up() -> None:
    async with held() as it:
        it.free()
        generation = await it.open(seed=1)
        await generation.result()
        for error in (None, ClientGone("left"), DeadlineExceeded("late")):
            generation.leave(error)
        assert it.cancelled() == {}
        assert it.record.outcome == "ok"


@aio
async def test_what_the_job_failed_with_is_raised() -> None:
    async with held() as it:

        def broken(seeds: list[int]) -> None:
            raise RuntimeError

        it.backbone.before = broken
        generation = await it.open()
        with pytest.raises(ForwardFailed):
            await generation.result()
        generation.leave(ForwardFailed("the model failed"))
        assert it.cancelled() == {}


@aio
async def test_no_file_before_the_end() -> None:
    async with held() as it:
        generation = await it.open()
        with pytest.raises(RuntimeError, match="wait"):
            await generation.files()
        generation.leave()


def test_events_after_the_loop_has_closed_are_dropped() -> None:
    loop = asyncio.new_event_loop()
    mailbox = Mailbox(loop)
    loop.close()
    mailbox.post(Queued(0))


# What is refused


@aio
async def test_each_refusal_says_when_to_come_back() -> None:
    async with held(max_queue=1, max_rows=1, drain_seconds=12.5) as it:
        pace = it.served.engine.pace
        for _ in range(500):
            pace.observe("unet", 1, 2.0)  # what warming up has measured is forgotten
        first = await it.open(seed=1)
        await it.running()
        second = await it.open(seed=2)

        async def refusal() -> tuple[int, str, str]:
            answer = await it.served.post()
            return answer.status_code, answer.json()["error"]["code"], answer.headers["retry-after"]

        assert await refusal() == (429, "queue_full", "12")
        it.served.engine.drain()
        assert await refusal() == (503, "draining", "13")
        for generation in (first, second):
            generation.leave()
        for reason in ("queue_full", "draining"):
            assert it.served.value("requests_rejected_total", reason=reason) == 1
        assert it.served.total("requests_rejected_total") == 2


@aio
async def test_only_refusals_for_lack_of_room_count_as_such() -> None:
    async with held() as it:
        it.free()
        assert (await it.served.post(num_inference_steps=999)).status_code == 422
        assert (await it.served.post(model="nope")).status_code == 404
        assert it.served.total("requests_rejected_total") == 0


@aio
async def test_a_server_that_loads_and_one_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    may_fail = threading.Event()

    class Stuck(FakeBackbone):
        def weight_bytes(self) -> int:
            assert may_fail.wait(PATIENCE)
            raise OSError("no such file")

    app = create_app(Settings(model=("unet",)), {"unet": Stuck().real})
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client,
    ):

        async def refusal() -> tuple[int, str, str]:
            answer = await client.post("/generate", json={"prompt": ""})
            return answer.status_code, answer.json()["error"]["code"], answer.headers["retry-after"]

        assert await refusal() == (503, "loading", "5")
        may_fail.set()
        await until(lambda: app.state.engine.state != "loading")
        assert await refusal() == (503, "engine_dead", "60")


# The end of the application


@aio
async def test_the_applications_end_answers_what_is_left_and_ends_its_threads() -> None:
    before = set(threading.enumerate())
    async with held(max_rows=1) as it:
        generations = [await it.open(seed=1), await it.open(seed=2)]
        await it.running()
        engine, service = it.served.engine, it.service

        def free() -> None:  # the tick that runs ends once the engine is to stop
            while engine.state != "stopped":
                time.sleep(0.001)
            it.free()

        freeing = threading.Thread(target=free)
        freeing.start()
    freeing.join()
    for generation in generations:
        with pytest.raises(Draining) as raised:
            await generation.result()
        assert raised.value.retry_after == 1
    assert (engine.state, engine.jobs, it.backbone.ticks) == ("stopped", 0, [[1]])
    with pytest.raises(RuntimeError, match="shutdown"):
        await service.pool.run(int)
    await until(lambda: not {t for t in set(threading.enumerate()) - before if t.name.startswith(("engine", "pool"))})
