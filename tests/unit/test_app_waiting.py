"""What requests keep while they wait, and for how long: bytes, pixels at once, deadlines from their arrival."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import threading
import time
from typing import Any

import pytest
from PIL import Image

from app.engine.job import Queued
from app.errors import DeadlineExceeded, QueueFull
from app.http import counting, service
from app.http.generation import Generation
from app.http.pool import THREADS
from app.http.record import Record
from app.http.routes.body import BodyRequest
from app.http.schemas.requests import GenerationRequest
from app.http.waiting import REQUEST_BYTES, Pixels, Waiting
from models.costs.usage import Usage
from models.request import Run
from tests.faked import Faked, faked
from tests.serving import aio, until


def test_room_is_held_changed_and_given_back_once() -> None:
    waiting = Waiting(100, lambda: 7)
    first = waiting.hold(60)
    with waiting.hold(40):
        assert waiting.bytes == 100
        with pytest.raises(QueueFull, match=r"100 bytes .* and 1 more would be over 100") as caught:
            waiting.hold(1)
        assert (caught.value.status, caught.value.retry_after) == (429, 7)
        first.resize(10)
        assert waiting.bytes == 50
        with pytest.raises(QueueFull):
            first.resize(61)
        assert waiting.bytes == 50, "as before"
    first.free()
    first.free()
    assert waiting.bytes == 0


@aio
async def test_pixels_are_decoded_together_up_to_the_most_in_order() -> None:
    pixels, order = Pixels(100), list[str]()
    free = {name: asyncio.Event() for name in "abcd"}

    async def decode(name: str, count: int) -> None:
        async with pixels.take(count):
            order.append(name)
            await free[name].wait()

    sizes = {"a": 60, "b": 40, "c": 400, "d": 1}  # c is more than the most, and decoded alone
    tasks = [asyncio.ensure_future(decode(name, count)) for name, count in sizes.items()]
    await until(lambda: order == ["a", "b"])
    assert pixels.used == 100
    free["a"].set()
    await tasks[0]
    assert order == ["a", "b"]
    free["b"].set()
    await until(lambda: order == ["a", "b", "c"])
    free["c"].set()
    await until(lambda: order == ["a", "b", "c", "d"])
    free["d"].set()
    await asyncio.gather(*tasks)
    assert pixels.used == 0


@aio
async def test_who_gives_up_waiting_for_pixels_takes_none() -> None:
    pixels = Pixels(10)
    async with pixels.take(10):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01), pixels.take(5):
                pass
    assert pixels.used == 0
    async with pixels.take(10):
        pass


def bomb(side: int = 4096) -> str:
    """A small file of many pixels, as base64."""
    out = io.BytesIO()
    Image.new("1", (side, side)).save(out, "PNG")
    assert len(out.getvalue()) < 4096
    return base64.b64encode(out.getvalue()).decode()


@aio
async def test_what_waits_is_counted_in_bytes_and_refused_beyond_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of 67 MB is kept at the model's size; what the body was is let go of; too much is 429."""
    kept = REQUEST_BYTES + 4 * 64 * 32
    async with faked(monkeypatch, max_waiting_bytes=2**20) as served:
        served.engine.script = [Queued(0)]  # nothing is ever answered
        waits = [asyncio.ensure_future(served.post(image=bomb())) for _ in range(3)]
        await until(lambda: len(served.engine.jobs) == 3)
        assert served.value("waiting_bytes") == 3 * kept
        assert {job.run.request.image.size for job in served.engine.jobs} == {(64, 32)}  # type: ignore[union-attr]
        answer = await served.post(image="A" * 2**20)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert answer.headers["retry-after"] == "7"
        assert served.value("requests_rejected_total", reason="queue_full") == 1
        assert served.value("waiting_bytes") == 3 * kept
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        await until(lambda: served.value("waiting_bytes") == 0)


def kept_by(one: object) -> object:
    """What an object, if it is of a request's handling, still has of an upload."""
    if type(one) is BodyRequest:
        return one._unparsed or (one._parsed or {}).get("image")
    return one.asked.image if type(one) is Generation else None


@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations", "/v1/images/edits"])
def test_nothing_of_an_upload_is_kept_once_it_is_accepted(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Neither by the request, whose parsed body FastAPI keeps, nor by what was made of it."""

    @aio
    async def test() -> None:
        image, form = bomb(512), path.endswith("edits")
        async with faked(monkeypatch) as served:
            served.engine.script = [Queued(0)]
            fields: dict[str, Any] = {"prompt": "a ring"}
            files = {"image": base64.b64decode(image)}
            sent: dict[str, Any] = {"data": fields, "files": files} if form else {"json": fields | {"image": image}}
            waits = asyncio.ensure_future(served.client.post(path, **sent))
            await until(lambda: len(served.engine.jobs) == 1)
            await until(lambda: not any(kept_by(one) for one in gc.get_objects()))
            found = [one for one in gc.get_objects() if type(one) in (Generation, BodyRequest)]
            assert len(found) >= (1 if form else 2), "there is something that could keep it"
            del found
            waits.cancel()
            await asyncio.gather(waits, return_exceptions=True)

    test()


async def opened(served: Faked, waited: float = 0.0, **asked: Any) -> Any:
    """A request that arrived so many seconds ago."""
    record = Record("id", arrived=time.monotonic() - waited)
    return await served.service.open(GenerationRequest.model_validate({"prompt": "a ring"} | asked), record)


@aio
async def test_a_deadline_runs_from_the_arrival_and_covers_the_wait_for_a_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with faked(monkeypatch) as served:
        generation = await opened(served, waited=20.0, timeout_seconds=50.0)
        assert 25 < generation.deadline - asyncio.get_running_loop().time() <= 30
        generation.leave()
        free = threading.Event()
        started: list[bool] = []

        def work() -> None:
            started.append(True)
            free.wait(20.0)

        busy = [asyncio.ensure_future(served.service.pool.run(work)) for _ in range(THREADS)]
        await until(lambda: len(started) == THREADS)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await opened(served, timeout_seconds=0.05)
        assert time.monotonic() - began < 10.0
        assert served.value("waiting_bytes") == 0
        assert len(served.engine.jobs) == 1
        free.set()
        await asyncio.gather(*busy)


@aio
async def test_an_answer_waits_for_no_count_but_the_one_that_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    async with faked(monkeypatch) as served:
        free, made = threading.Event(), list[int]()

        def usage(backbone: object, run: Run, ran: object) -> Usage:
            made.append(run.num_inference_steps)
            free.wait(20.0)
            return Usage(len(run.steps), run.num_rows, 1, 2, run.evaluations)

        monkeypatch.setattr(service, "usage", usage)
        script, served.engine.script = served.engine.script, [Queued(0)]
        others = [await opened(served) for _ in range(3)]
        served.engine.script = script
        asking = asyncio.ensure_future(served.post(num_inference_steps=7, guidance_scale=1.0))
        await asyncio.wait({asking}, timeout=0.5)
        assert not asking.done()
        monkeypatch.setattr(counting, "COUNT_SECONDS", 0.05)
        answer = await served.post(num_inference_steps=6, guidance_scale=1.0)
        assert answer.status_code == 200
        counted = {"steps": 6, "evaluations": 6, "rows": 6}
        assert answer.json()["usage"] == counted | {"macs": None, "macs_unaccelerated": None}
        free.set()
        assert (await asking).json()["usage"]["macs"] == 1
        assert 7 in made[1:3]
        for generation in others:
            generation.leave()
