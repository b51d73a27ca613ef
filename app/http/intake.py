"""Taking in the bodies of requests: how large, how slowly, packed how, and how many bytes of all of them at once."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Mapping

from prometheus_client import Gauge
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import (
    ClientGone,
    Draining,
    Malformed,
    Overloaded,
    RequestTimeout,
    ServiceError,
    TooLarge,
    UnsupportedEncoding,
)
from app.http.middleware import route_path
from app.http.problems import answer
from app.metrics import Metrics
from app.settings import Settings
from models.errors import cut

FREE_BYTES = 2**16
"""What a request may hold whatever the others hold, so that small ones are taken while large ones wait."""
LEAST_RATE = 2**14
"""Bytes a second at which a body has to come, at least."""
RETRY_SECONDS = 1
WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
"""How zlib is told of the ways to pack a body that are taken."""


class Room:
    """Bytes that are held for all requests together."""

    def __init__(self, what: str, most: int, held: Gauge) -> None:
        self._what = what
        self._most = most
        self.held = 0
        held.set_function(lambda: self.held)

    def take(self, count: int) -> None:
        """Hold some more. Raises `Overloaded`."""
        if self.held + count > self._most:
            message = f"{self._what} of {self.held} bytes are held already, of {self._most}"
            raise Overloaded(message, retry_after=RETRY_SECONDS)
        self.held += count

    def give(self, count: int) -> None:
        """Let go."""
        self.held -= count


class Bodies(Room):
    """The bodies of all requests that are held in memory; and the readings that wait for more."""

    def __init__(self, most: int, held: Gauge) -> None:
        super().__init__("bodies", most, held)
        self._reading: set[asyncio.Timeout] = set()
        self.closed = False

    def close(self) -> None:
        """The server drains: nobody waits for the rest of a body any more."""
        if self.closed:  # whoever began since then waits for nothing
            return
        self.closed = True
        for reading in self._reading:
            if not reading.expired():
                reading.reschedule(0.0)

    async def read(self, receive: Receive, deadline: float) -> Message:
        """The next part of a body. Raises `RequestTimeout`, or `Draining` where that came between."""
        try:
            async with asyncio.timeout_at(0.0 if self.closed else deadline) as reading:
                self._reading.add(reading)
                return await receive()
        except TimeoutError:
            if self.closed:
                raise Draining("the server is shutting down", retry_after=RETRY_SECONDS) from None
            raise RequestTimeout("the body came too slowly") from None
        finally:
            self._reading.discard(reading)


class Intake:
    """Reads a request's whole body before anybody looks at it, and holds its bytes until the request is answered."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        metrics: Metrics,
        bodies: Bodies,
        streamed: Mapping[str, int] | None = None,
    ) -> None:
        """`streamed` are paths, with the most bytes each takes, whose routes read the body bit by bit themselves, into
        a file: such bytes have a limit of their own."""
        self._app = app
        self._most = settings.max_body_bytes
        self._streamed = streamed or {}
        self._pause = settings.body_seconds
        self._metrics = metrics
        self._bodies = bodies
        self._spool = Room("files", settings.max_spool_bytes, metrics.spool_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a `receive` that has all of the body at once."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if (most := self._streamed.get(route_path(scope))) is not None:
            await self._stream(scope, receive, send, most)
            return
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            before, after = (max(0, size - FREE_BYTES) for size in (taken, taken + count))
            self._bodies.take(after - before)
            taken += count

        try:
            waiting: list[Message] = [await self._message(scope, receive, take)]

            async def replay() -> Message:
                return waiting.pop() if waiting else await receive()

            await self._app(_unpacked(scope), replay, send)
        except ServiceError as error:
            await self._refuse(error, scope, receive, send)
        finally:
            self._bodies.give(max(0, taken - FREE_BYTES))

    async def _refuse(self, error: ServiceError, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["record"].failed(error)
        if error.outcome == "rejected":
            self._metrics.rejected.labels(error.code).inc()
        if not isinstance(error, ClientGone):
            await answer(error)(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send, most: int) -> None:
        """Pass a request on whose body goes into a file as it comes; its bytes count until it is answered."""
        spooled = 0

        def take(count: int) -> None:
            nonlocal spooled
            self._spool.take(count)
            spooled += count

        try:
            if _declared(scope) > most:
                await self._refuse(_too_large(most), scope, receive, send)
            else:
                await self._app(scope, self._bit_by_bit(receive, most, take), send)
        finally:
            self._spool.give(spooled)

    def _bit_by_bit(self, receive: Receive, most: int, take: Callable[[int], None]) -> Receive:
        """A `receive` for a body that is not held: bounded in size and time, until its end. Raises as `_message`."""
        loop = asyncio.get_running_loop()
        began, size, more = loop.time(), 0, True

        async def bit() -> Message:
            nonlocal size, more
            if not more:
                return await receive()
            message = await self._bodies.read(receive, min(loop.time(), began + size / LEAST_RATE) + self._pause)
            if message["type"] == "http.disconnect":
                raise ClientGone("the client left before it had sent its body")
            more = message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > most:
                raise _too_large(most)
            take(len(message.get("body", b"")))
            return message

        return bit

    async def _message(self, scope: Scope, receive: Receive, take: Callable[[int], None]) -> Message:
        """The body as one message. Raises what the client is to be told."""
        headers = Headers(scope=scope)
        if _declared(scope) > self._most:
            raise _too_large(self._most)
        unpack = self._unpacker(headers.get("content-encoding", "identity").strip().lower())
        loop = asyncio.get_running_loop()
        began, size, more = loop.time(), 0, True
        parts: list[bytes] = []
        while more:
            now = loop.time()
            until = min(now, began + size / LEAST_RATE) + self._pause
            message = await self._bodies.read(receive, until)
            if message["type"] == "http.disconnect":
                raise ClientGone("the client left before it had sent its body")
            more = message.get("more_body", False)
            part = await unpack(message.get("body", b""), self._most - size, not more)
            size += len(part)
            if size > self._most:
                raise _too_large(self._most)
            take(len(part))
            parts.append(part)
        return {"type": "http.request", "body": parts[0] if len(parts) == 1 else b"".join(parts), "more_body": False}

    def _unpacker(self, encoding: str) -> Callable[[bytes, int, bool], Awaitable[bytes]]:
        """What unpacks a part: at most one byte more than there is room for; the last part has to be the end."""
        if encoding == "identity":

            async def same(data: bytes, room: int, last: bool) -> bytes:
                return data

            return same
        if encoding not in WINDOW_BITS:
            known = ", ".join(WINDOW_BITS)
            raise UnsupportedEncoding(f"Content-Encoding: {cut(encoding)!r} is not one of {known}")
        unpacking = zlib.decompressobj(WINDOW_BITS[encoding])

        def unpack(data: bytes, room: int, last: bool) -> bytes:
            try:
                found = unpacking.decompress(data, room + 1)
            except zlib.error as error:
                raise Malformed(f"the body is no {encoding}") from error
            if len(found) <= room and (unpacking.unused_data or (last and not unpacking.eof)):
                raise Malformed(f"the body is not one whole {encoding}")
            return found

        async def apart(data: bytes, room: int, last: bool) -> bytes:
            """A few bytes may become very many, which takes the loop too long."""
            return await asyncio.to_thread(unpack, data, room, last)

        return apart


def _declared(scope: Scope) -> int:
    """The size that a body is said to have; 0 where nothing is said."""
    declared = Headers(scope=scope).get("content-length", "")
    return int(declared[:20]) if declared.isdecimal() else 0


def _too_large(most: int) -> TooLarge:
    return TooLarge(f"the body is larger than {most} bytes")


def _unpacked(scope: Scope) -> Scope:
    """A request whose body is not packed any more."""
    names = (b"content-encoding", b"content-length")
    if not any(name == names[0] for name, _ in scope["headers"]):
        return scope
    return {**scope, "headers": [(name, value) for name, value in scope["headers"] if name not in names]}
