"""Requests that end early: departed clients, deadlines, a full queue, a draining server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from models import Backbone
from models.reuse.rows import Row
from tests.serving import PROMPT, Served, aio, hooked, serving, slowed

Model = Callable[..., Backbone]
LONG: dict[str, Any] = {"num_inference_steps": 200}


async def raw(served: Served, body: dict[str, Any], leave: asyncio.Event) -> list[dict[str, Any]]:
    """One ASGI request whose client leaves when `leave` is set; what was sent to it."""
    sent: list[dict[str, Any]] = []
    parts = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if parts:
            return parts.pop()
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/generate",
        "raw_path": b"/generate",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"content-type", b"application/json")],
        "client": ("test", 1),
        "server": ("test", 80),
    }
    await served.app(scope, receive, send)
    return sent


@aio
async def test_a_departed_clients_rows_are_gone_at_the_next_tick(student_of: Model) -> None:
    rows: list[int] = []

    def look(batch: Sequence[Row]) -> None:
        rows.append(len(batch))

    backbone = hooked(slowed(student_of("sd"), 0.02), look)
    async with serving({"sd": backbone}) as served:
        for stream in (False, True):
            leave = asyncio.Event()
            leaving = asyncio.ensure_future(raw(served, {"prompt": PROMPT, "stream": stream} | LONG, leave))
            staying = asyncio.ensure_future(served.post(num_inference_steps=30))
            await served.until(lambda: rows[-1:] == [4])
            leave.set()
            await leaving
            ticks = len(rows)
            answer = await staying
            assert answer.status_code == 200
            assert 4 not in rows[ticks + 2 :]  # the tick that ran, and one that had been chosen already
            assert answer.json()["usage"]["steps"] == 30
            await served.until(lambda: served.value("requests_running") == 0)
            rows.clear()
        facts = {"model": "sd", "acceleration": "none"}
        assert served.value("requests_total", endpoint="/generate", outcome="cancelled", **facts) == 2
        assert served.value("requests_cancelled_total", cause="client") == 2
        assert served.value("feature_memory_bytes", model="sd") == 0


@aio
async def test_one_who_leaves_while_waiting_is_never_started(student_of: Model) -> None:
    async with serving({"sd": slowed(student_of("sd"), 0.02)}, max_rows=2) as served:
        first = asyncio.ensure_future(served.post(num_inference_steps=20))
        await served.until(lambda: served.value("requests_running") == 1)
        leave = asyncio.Event()
        second = asyncio.ensure_future(raw(served, {"prompt": PROMPT} | LONG, leave))
        await served.until(lambda: served.value("requests_waiting") == 1)
        leave.set()
        await second
        assert (await first).status_code == 200
        assert served.value("queue_duration_seconds_count", model="sd") == 1
        assert served.engine.jobs == 0


@aio
async def test_deadlines(student_of: Model) -> None:
    async with serving({"sd": slowed(student_of("sd"), 0.05)}) as served:
        late, streamed, fine = await asyncio.gather(
            served.post(timeout_seconds=0.3, **LONG),
            served.post(timeout_seconds=0.3, stream=True, **LONG),
            served.post(num_inference_steps=12),
        )
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "deadline_exceeded"
        assert "event: error" in streamed.text
        assert "deadline_exceeded" in streamed.text
        assert fine.status_code == 200
        await served.until(lambda: served.engine.jobs == 0)
        facts = {"model": "sd", "acceleration": "none"}
        assert served.value("requests_total", endpoint="/generate", outcome="deadline", **facts) == 2
        assert served.value("requests_cancelled_total", cause="deadline") == 2


@aio
async def test_a_full_queue_says_when_to_come_back(student_of: Model) -> None:
    async with serving({"sd": slowed(student_of("sd"), 0.05)}, max_rows=2, max_queue=2) as served:
        first = asyncio.ensure_future(served.post(num_inference_steps=20))
        await served.until(lambda: served.value("requests_running") == 1)
        others = [asyncio.ensure_future(served.post(num_inference_steps=20)) for _ in range(2)]
        await served.until(lambda: served.value("requests_waiting") == 2)
        refused = await served.post()
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        refused_at = time.monotonic()
        assert served.value("requests_rejected_total", reason="queue_full") == 1
        assert [(await request).status_code for request in (first, *others)] == [200] * 3
        drained = time.monotonic() - refused_at
        assert drained / 4 <= int(refused.headers["retry-after"]) <= 4 * drained + 1
        assert (await served.post()).status_code == 200


@aio
async def test_draining_finishes_what_was_accepted_and_refuses_the_rest(student_of: Model) -> None:
    async with serving({"sd": slowed(student_of("sd"), 0.02)}) as served:
        accepted = asyncio.ensure_future(served.post(num_inference_steps=20))
        await served.until(lambda: served.engine.jobs == 1)
        served.engine.drain()
        refused = await served.post()
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert refused.json()["error"]["code"] == "draining"
        assert (await served.client.get("/health/ready")).status_code == 503
        assert (await served.client.get("/health/live")).status_code == 200
        assert served.value("ready") == 0
        assert served.value("requests_rejected_total", reason="draining") == 1
        assert (await accepted).status_code == 200


@aio
async def test_what_a_drain_cuts_off_is_answered(student_of: Model) -> None:
    async with serving({"sd": slowed(student_of("sd"), 0.02)}) as served:
        cut = [asyncio.ensure_future(served.post(stream=stream, **LONG)) for stream in (False, True)]
        await served.until(lambda: served.value("requests_running") == 2)
        await asyncio.to_thread(served.engine.close)
        answers: list[httpx.Response] = await asyncio.gather(*cut)
        assert answers[0].status_code == 503
        assert '"draining"' in answers[1].text
        assert served.value("requests_cancelled_total", cause="shutdown") == 2
