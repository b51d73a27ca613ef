"""What the generating routes share: the service of a request, waiting while the client is there, streaming events."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.errors import ClientGone, Internal, ServiceError
from app.http.generation import Generation
from app.http.middleware import key_in
from app.http.problems import body as error_body
from app.http.problems import translate
from app.http.routes.body import BodyRequest
from app.http.schemas.requests import PICTURES, GenerationRequest
from app.http.service import Service
from app.logs import REQUESTS

T = TypeVar("T")
Spell = Callable[[Generation], AsyncIterator[tuple[str, dict[str, Any]]]]
"""How a route spells the events of a stream: names and data."""


def service_of(request: Request) -> Service:
    """The service behind the app."""
    service: Service = request.app.state.service
    return service


def client_of(request: Request) -> str:
    """Whose share of the device a request is served with: its key's where keys are asked for, else its address's."""
    if service_of(request).settings.api_keys:
        return f"key {digest_of_key(request)}"
    return "" if request.client is None else request.client.host


def digest_of_key(request: Request) -> str:
    """The same for every way to spell the header of one key."""
    key = key_in(request.headers.get("authorization", "").encode("latin-1")).decode("latin-1")
    return hashlib.sha256(f"slipstream:{key}".encode()).hexdigest()[:32]


async def respond(
    request: Request,
    asked: GenerationRequest,
    finish: Callable[[Generation], Coroutine[Any, Any, Response]],
    spell: Spell | None = None,
    uploads: dict[str, bytes] | None = None,
) -> Response:
    """Open a generation and answer with its stream, where the route has any, or with what `finish` makes of it."""
    request.state.record.client = client_of(request)
    opened: list[Generation] = []

    async def opening() -> Generation:
        opened.append(await service_of(request).open(asked, request.state.record, uploads))
        return opened[0]

    try:
        generation = await while_connected(request, opening())
    except BaseException as ended:
        for left in opened:  # in the same turn of the loop as the client left, or as this was cancelled
            left.leave(ended)
        raise
    if isinstance(request, BodyRequest):
        for name in (*PICTURES, "control"):
            request.forget(name)
    if spell is not None and asked.stream:
        return Stream(generation, spell)
    error: BaseException | None = ClientGone("the handler was cancelled")
    try:
        response = await while_connected(request, finish(generation))
        error = None
        return response
    except ServiceError as raised:
        error = raised
        raise
    finally:
        generation.leave(error)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work; raise `ClientGone` as soon as the client leaves."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_departure(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone("the client left before its answer")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _departure(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Stream(EventSourceResponse):
    """A generation as Server-Sent Events. However it ends, also before its first event, the generation is left."""

    def __init__(self, generation: Generation, spell: Spell) -> None:
        # A server that is told to end lets what it has accepted end by itself.
        grace = max(0.0, generation.deadline - asyncio.get_running_loop().time())
        super().__init__(self._events(generation, spell), ping=15, sep="\n", shutdown_grace_period=grace)
        self._generation = generation
        self._error: ServiceError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.leave(self._error)

    async def _events(self, generation: Generation, spell: Spell) -> AsyncIterator[ServerSentEvent]:
        try:
            async for name, data in spell(generation):
                yield event(name, data)
        except Exception as raised:
            self._error = translate(raised)
            if isinstance(self._error, Internal) and not isinstance(raised, ServiceError):
                facts = {"request_id": generation.record.request_id}
                REQUESTS.exception("unforeseen", extra={"facts": facts})
            generation.record.failed(self._error)
            generation.record.status = 200  # which has been sent already
            yield event("error", error_body(self._error))


def event(name: str, data: dict[str, Any]) -> ServerSentEvent:
    """One event of a stream."""
    return ServerSentEvent(json.dumps(data), event=name)
