"""One connection: uvicorn's, with a limit on their number, time-outs, strict framing, answers to the half-closed."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from app.errors import Malformed, Overloaded, RequestTimeout, ServiceError
from app.http.problems import body
from app.metrics import Metrics

STALL_SECONDS = 30.0
"""A client that takes nothing of its answer for so long is cut off."""
PROBES = (0.1, 1.0, 5.0)
"""Seconds between the words to a client that has closed its side: who is gone altogether is noticed at the second."""


class Framing(h11.Connection):
    """Refuses what two readers might take for different requests."""

    def next_event(self) -> Any:
        """As h11's."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            if {b"content-length", b"transfer-encoding"} <= names:
                raise h11.RemoteProtocolError("Content-Length beside Transfer-Encoding")
        return event


@dataclass
class Gate:
    """What all connections share: their limit, how long a head may take, and which of them have nothing to do."""

    connections: int
    head_seconds: float
    metrics: Metrics
    idle: dict[Protocol, None] = field(default_factory=dict)
    """Connections without a whole request, the longest first: they make room for new ones."""

    def enter(self, arrived: Protocol) -> None:
        """A connection more. One too many costs the longest idle one its place, or the new one, told so."""
        self.idle[arrived] = None
        if len(arrived.connections) > self.connections:
            self.metrics.dropped.labels("limit").inc()
            longest = next(iter(self.idle))
            if longest is arrived:
                arrived.refuse(Overloaded(f"{self.connections} connections are open already", retry_after=1))
            else:
                longest.drop()


class Protocol(H11Protocol):
    """A connection behind a gate."""

    def __init__(self, *arguments: Any, gate: Gate, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.conn = Framing(h11.SERVER)
        self._gate = gate
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a head."""
        super().connection_made(transport)
        self._watch()
        self._gate.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        super().connection_lost(exc)
        self._unwatch()
        self._flows()
        self._gate.idle.pop(self, None)

    def data_received(self, data: bytes) -> None:
        """Some bytes."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the rest of this one, which nobody reads any more."""
        super().on_response_complete()
        if not self.transport.is_closing():
            self._look()

    def pause_writing(self) -> None:
        """The client is slower than the answer."""
        super().pause_writing()
        self._stalls()

    def resume_writing(self) -> None:
        """It has taken most of it."""
        super().resume_writing()
        self._flows()

    def _stalls(self) -> None:
        if self._stall is None:
            self._stall = self.loop.call_later(STALL_SECONDS, self._stalled, self.transport.get_write_buffer_size())

    def _flows(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _stalled(self, before: int) -> None:
        """Go on waiting where the client took some; else give up what it never took."""
        self._stall = None
        if self.transport.get_write_buffer_size() < before:
            self._stalls()
        else:
            self._gate.metrics.dropped.labels("slow").inc()
            self.transport.abort()

    def _look(self) -> None:
        """Keep time where the client has to say something; not where we have."""
        if self.transport.is_closing():
            return
        answered = self.cycle is None or self.cycle.response_complete
        if answered:
            self._gate.idle.setdefault(self)
            if self.timeout_keep_alive_task is None or self.conn.their_state is h11.SEND_BODY:
                self._watch()
        else:
            self._gate.idle.pop(self, None)
            self._unwatch()

    def _watch(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self._gate.head_seconds, self._late)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        """Nothing whole has come in time."""
        if self.transport.is_closing():
            return
        self._gate.metrics.dropped.labels("slow").inc()
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self.refuse(RequestTimeout("the head of the request came too slowly"))
        else:
            self.drop()

    def drop(self) -> None:
        """Close without a word."""
        self.connections.discard(self)
        self._gate.idle.pop(self, None)
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._stalls()

    def refuse(self, error: ServiceError) -> None:
        """Answer in our shape what never becomes a request, and close."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            data = json.dumps(body(error)).encode()
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(data))),
                ("Connection", "close"),
            ]
            if error.retry_after is not None:
                headers.append(("Retry-After", str(error.retry_after)))
            response = h11.Response(status_code=error.status, headers=headers, reason=STATUS_PHRASES[error.status])
            for event in (response, h11.Data(data=data), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.drop()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or frames itself in two ways."""
        self._gate.metrics.dropped.labels("malformed").inc()
        self.refuse(Malformed("this is not a request, or one that could be read in two ways"))

    def _unsupported_upgrade_warning(self) -> None:
        """Whoever asks for another protocol is answered in this one: no line in the log each time."""

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """The client says no more. Where it has asked for something, it may still be listening."""
        cycle = self.cycle
        asked = cycle is not None and not cycle.response_complete and not cycle.more_body
        if not asked or self.scope["http_version"] != "1.1":
            return None
        cycle.keep_alive = False
        self._probe(PROBES)
        return True

    def _probe(self, delays: tuple[float, ...]) -> None:
        """An interim answer: nothing to a client that listens, an error of the socket where nobody is there."""
        if self.transport.is_closing() or self.cycle.response_started:
            return
        interim = h11.InformationalResponse(status_code=102, headers=[], reason=b"Processing")
        self.transport.write(self.conn.send(interim) or b"")
        if delays:
            self.loop.call_later(delays[0], self._probe, delays[1:])

    def shutdown(self) -> None:
        """The server drains."""
        if not self.transport.is_closing():
            super().shutdown()
