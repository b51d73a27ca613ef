"""What happens around every request, as plain ASGI: its id and record, the key, the size of its body, safe headers."""

from __future__ import annotations

import asyncio
import base64
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import ClientGone, Draining, Internal, ServiceError, Unauthorized
from app.http.problems import answer
from app.http.record import Record
from app.logs import REQUESTS
from app.metrics import Metrics
from models.errors import cut

if TYPE_CHECKING:
    from app.http.traces import Traces

ENDPOINTS = ("/generate", "/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img", "/sdapi/v1/img2img")
"""Routes that are counted, by their path."""
ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

CUT_OFF = "Task cancelled, timeout graceful shutdown exceeded"
"""What uvicorn says to the handlers that it does not wait for, where it runs the app by itself."""
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SAFE_HEADERS = {
    "Content-Security-Policy": PAGE_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


def route_path(scope: Scope) -> str:
    """The path that routes are matched by: a proxy may serve the app under a prefix, which ASGI calls root_path."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root) if path == root or path.startswith(f"{root}/") else path


class Observe:
    """Outermost: takes or makes the request id, answers what nobody caught, counts and logs every request once."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        cors: bool,
        ending: Callable[[], bool] = lambda: False,
        traces: Traces | None = None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._traces = traces
        self._ending = ending
        self._headers = {k: v for k, v in SAFE_HEADERS.items() if not (cors and k == "Cross-Origin-Resource-Policy")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a fresh `Record` in its state."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        given = Headers(scope=scope).get("x-request-id", "")
        record = Record(given if ID.fullmatch(given) else uuid.uuid4().hex)
        if scope["method"] == "POST" and (path := route_path(scope)) in ENDPOINTS:
            record.endpoint = path
        scope.setdefault("state", {})["record"] = record
        started = False

        async def observed(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                record.status = record.status or message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = record.request_id
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except asyncio.CancelledError as error:
            if not (self._ending() or CUT_OFF in error.args):
                record.failed(ClientGone("whoever called cancelled the request"))
                raise
            # The end of the process, which has nothing to wait for: the client has its answer instead.
            record.failed(Draining("the server was shut down before this request was done", retry_after=1))
            if not started:
                await answer(Draining(record.error, retry_after=1))(scope, receive, observed)
        except Exception as error:
            if started and isinstance(error, OSError):
                record.failed(ClientGone("the client left while it was being answered"))
                return
            record.failed(Internal("an internal error; the server's log has it under this request's X-Request-Id"))
            REQUESTS.exception("unforeseen", extra={"facts": {"request_id": record.request_id}})
            if not started:
                await answer(Internal(record.error))(scope, receive, observed)
        finally:
            self._finish(scope, record, time.monotonic() - began)

    def _finish(self, scope: Scope, record: Record, seconds: float) -> None:
        if record.endpoint:
            labels = (record.model, record.acceleration, record.outcome)
            self._metrics.requests.labels(record.endpoint, *labels).inc()
            self._metrics.request_seconds.labels(*labels).observe(seconds)
        facts: dict[str, Any] = {
            "request_id": record.request_id,
            "method": cut(scope["method"]),
            "path": cut(scope["path"]),
        }
        facts |= {"status": record.status, "seconds": round(seconds, 4)}
        if record.endpoint:
            facts |= {"model": record.model, "acceleration": record.acceleration, "outcome": record.outcome}
        if record.endpoint and self._traces is not None:
            trace_id = self._traces.request(scope, record, seconds)
            facts |= {} if trace_id is None else {"trace_id": trace_id}
        facts |= {"code": record.code, "error": record.error} if record.code else {}
        quiet = not record.endpoint and (record.status < 400 or scope["path"].startswith("/health/"))
        REQUESTS.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"facts": facts | record.facts})


class Authorize:
    """Asks for `Authorization: Bearer KEY`, except on open paths. Keys are compared in constant time."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], open_paths: Sequence[str]) -> None:
        self._app = app
        self._keys = [spelt for key in keys for spelt in _spellings(key)]
        self._open = tuple(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on if it may."""
        if scope["type"] != "http" or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        await _refuse(Unauthorized("give a valid key as 'Authorization: Bearer KEY'"), scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        path = route_path(scope)
        if any(
            path == known or (known.endswith("/") and known != "/" and path.startswith(known)) for known in self._open
        ):
            return True
        given = key_in(next((value for name, value in scope["headers"] if name == b"authorization"), b""))
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        return any(matches)


def key_in(header: bytes) -> bytes:
    """The key in an Authorization header: of Bearer, or as the password of Basic, which some tools can only send."""
    scheme, _, given = header.partition(b" ")
    match scheme.lower():
        case b"bearer":
            return given.strip()
        case b"basic":
            try:
                return base64.b64decode(given.strip(), validate=True).partition(b":")[2]
            except ValueError:
                return b""
    return b""


def _spellings(key: str) -> set[bytes]:
    """A key as clients send it: in UTF-8, or in Latin-1 as HTTP once had it, where that has all its letters."""
    latin = {key.encode("latin-1")} if all(ord(letter) < 256 for letter in key) else set()
    return {key.encode(), *latin}


class Head:
    """Answers HEAD wherever GET is answered, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a HEAD on as a GET."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        answered = asyncio.Event()

        async def bodiless(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                answered.set()

        answering = asyncio.ensure_future(self._app({**scope, "method": "GET"}, receive, bodiless))
        waiting = asyncio.ensure_future(answered.wait())
        try:
            await asyncio.wait({answering, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:  # a body that is streamed may have no end, and is for nobody
            for task in (answering, waiting):
                task.cancel()
            await asyncio.gather(answering, waiting, return_exceptions=True)


async def _refuse(error: ServiceError, scope: Scope, receive: Receive, send: Send) -> None:
    scope["state"]["record"].failed(error)
    await answer(error)(scope, receive, send)
