"""Bodies as they are taken in: how large, how slowly, packed how, and how many bytes of all of them at once."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from app.errors import ServiceError
from app.http.intake import FREE_BYTES, Bodies, Intake
from app.http.middleware import Observe
from app.http.problems import answer
from app.metrics import Metrics
from app.settings import Settings
from tests.serving import aio, until

MIB = 2**20


class Taken:
    """`Intake` before an app that notes the bodies it is given, and answers when it may."""

    def __init__(self, **settings: Any) -> None:
        self.metrics, given = Metrics(), Settings(**settings)
        self.bodies = Bodies(given.max_inflight_bytes, self.metrics.body_bytes)
        self._app = Observe(Intake(self._note, given, self.metrics, self.bodies), self.metrics, cors=False)
        self.seen: list[bytes] = []
        self.scopes: list[Scope] = []
        self.answer = asyncio.Event()
        self.answer.set()

    async def _note(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        assert not message["more_body"]
        self.seen.append(message["body"])
        self.scopes.append(scope)
        await self.answer.wait()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def post(self, *parts: bytes | None, **headers: str) -> tuple[int, str]:
        """Send a body in parts, None for silence; the status and the error's code."""
        coming = iter(parts)
        count, sent = len(parts), list[Message]()
        given = 0

        async def receive() -> Message:
            nonlocal given
            part = next(coming, None)
            given += 1
            if part is None:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": part, "more_body": given < count}

        async def send(message: Message) -> None:
            sent.append(message)

        spelt = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        await self._app({"type": "http", "method": "POST", "path": "/generate", "headers": spelt}, receive, send)
        text = b"".join(message.get("body", b"") for message in sent)
        return int(sent[0]["status"]), json.loads(text)["error"]["code"] if text else ""


@aio
async def test_a_body_comes_whole_however_it_was_cut() -> None:
    taken = Taken()
    assert await taken.post(b"ab", b"", b"cd") == (204, "")
    assert await taken.post(b"") == (204, "")
    assert taken.seen == [b"abcd", b""]
    assert taken.bodies.held == 0


@aio
async def test_a_body_may_be_as_large_as_it_is_said_and_no_larger() -> None:
    taken = Taken(max_body_bytes=1024)
    assert await taken.post(b"x" * 1000, b"y" * 24) == (204, "")
    assert await taken.post(b"x" * 1000, b"y" * 25) == (413, "body_too_large")
    assert await taken.post(None, content_length="1025") == (413, "body_too_large"), "before a byte is read"
    assert await taken.post(None, content_length="9" * 5000) == (413, "body_too_large")


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "deflate", "GZIP"])
def test_packed_bodies_are_unpacked(encoding: str) -> None:
    @aio
    async def test() -> None:
        taken, text = Taken(), b"a" * 300_000
        packed = gzip.compress(text) if "gzip" in encoding.lower() else zlib.compress(text)
        assert await taken.post(packed[:20], packed[20:], content_encoding=encoding, content_length="7") == (204, "")
        assert taken.seen == [text]
        assert taken.scopes[0]["headers"] == [], "the app sees a body that is not packed"

    test()


@aio
async def test_packed_bodies_are_bounded_unpacked() -> None:
    taken = Taken(max_body_bytes=MIB)
    bomb = gzip.compress(b"a" * (50 * MIB))
    assert len(bomb) < MIB
    assert await taken.post(bomb, content_encoding="gzip") == (413, "body_too_large")
    assert await taken.post(gzip.compress(b"a" * MIB), content_encoding="gzip") == (204, "")


@pytest.mark.parametrize(
    ("data", "encoding", "expected"),
    [
        (b"no gzip at all", "gzip", (400, "malformed")),
        (gzip.compress(b"abc")[:-3], "gzip", (400, "malformed")),
        (gzip.compress(b"abc") + b"more", "gzip", (400, "malformed")),
        (b"abc", "br", (415, "unsupported_encoding")),
        (b"abc", "gzip, gzip", (415, "unsupported_encoding")),
    ],
    ids=["no gzip", "cut", "more", "br", "twice"],
)
def test_what_cannot_be_unpacked_is_refused(data: bytes, encoding: str, expected: tuple[int, str]) -> None:
    @aio
    async def test() -> None:
        taken = Taken()
        assert await taken.post(data, content_encoding=encoding) == expected
        assert (taken.seen, taken.bodies.held) == ([], 0)

    test()


@aio
async def test_silence_within_a_body_is_not_waited_for() -> None:
    taken = Taken(body_seconds=0.05)
    assert await taken.post(b"x", None, b"y") == (408, "request_timeout")
    assert taken.bodies.held == 0


@aio
async def test_bytes_of_all_bodies_are_bounded_but_small_ones_go_through() -> None:
    taken = Taken(max_inflight_bytes=MIB, max_body_bytes=2 * MIB)
    taken.answer.clear()
    large = asyncio.ensure_future(taken.post(b"x" * MIB))
    await until(lambda: len(taken.seen) == 1)
    assert taken.bodies.held == MIB - FREE_BYTES
    assert taken.metrics.registry.get_sample_value("slipstream_body_bytes") == MIB - FREE_BYTES
    assert await taken.post(b"x" * MIB) == (503, "overloaded")
    assert taken.metrics.registry.get_sample_value("slipstream_requests_rejected_total", {"reason": "overloaded"}) == 1
    small = [asyncio.ensure_future(taken.post(b"x" * FREE_BYTES)) for _ in range(40)]
    await until(lambda: len(taken.seen) == 41)
    taken.answer.set()
    assert await asyncio.gather(large, *small) == [(204, "")] * 41
    assert taken.bodies.held == 0
    assert taken.metrics.registry.get_sample_value("slipstream_body_bytes") == 0


@aio
async def test_a_drain_waits_for_no_body() -> None:
    taken = Taken(body_seconds=600)
    slow = asyncio.ensure_future(taken.post(b"x", None, b"y"))
    await until(lambda: bool(taken.bodies._reading))
    taken.bodies.close()
    assert await slow == (503, "draining")
    assert await taken.post(None) == (503, "draining"), "nor for those that come later"
    assert await taken.post(b"whole") == (204, "")


@aio
async def test_a_drain_may_be_asked_for_in_every_turn_of_the_loop() -> None:
    """A body that begins meanwhile has a time-out that is already over, which cannot be moved."""
    taken = Taken(body_seconds=600)
    taken.bodies.close()
    slow = asyncio.ensure_future(taken.post(None))
    for _ in range(20):
        taken.bodies.close()
        await asyncio.sleep(0)
    assert await slow == (503, "draining")


@aio
async def test_files_on_their_way_have_a_limit_of_their_own_and_give_it_back() -> None:
    metrics, settings = Metrics(), Settings(max_spool_bytes=MIB, max_inflight_bytes=MIB)
    bodies, seen, go_on = Bodies(MIB, metrics.body_bytes), list[int](), asyncio.Event()

    async def read(scope: Scope, receive: Receive, send: Send) -> None:
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
        seen.append(size)
        await go_on.wait()

    async def post(count: int) -> list[Message]:
        sent: list[Message] = []
        left = [{"type": "http.request", "body": b"x" * 2**18, "more_body": i > 0} for i in range(count)]

        async def receive() -> Message:
            return left.pop()

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"content-type", b"multipart/form-data")]
        await app({"type": "http", "method": "POST", "path": "/v1/files", "headers": headers}, receive, send)
        return sent

    def held() -> float:
        return metrics.registry.get_sample_value("slipstream_spool_bytes") or 0.0

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await read(scope, receive, send)
        except ServiceError as error:
            await answer(error)(scope, receive, send)

    intake = Intake(answering, settings, metrics, bodies, streamed={"/v1/files": 2 * MIB})
    app = Observe(intake, metrics, cors=False)
    first = asyncio.ensure_future(post(3))
    await until(lambda: seen == [3 * 2**18])
    assert (held(), bodies.held) == (3 * 2**18, 0)
    [start, body] = await post(2)
    assert (start["status"], json.loads(body["body"])["error"]["code"]) == (503, "overloaded")
    assert held() == 3 * 2**18, "what was refused holds nothing"
    go_on.set()
    await first
    assert held() == 0
    await post(4)
    assert seen == [3 * 2**18, 4 * 2**18]
    assert held() == 0
