"""What stands in front of Ray Serve's HTTP proxy. The proxies import this file, so it needs neither torch nor Ray."""

from __future__ import annotations

import json

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

RETRY_AFTER = "1"
LOST = {
    "message": "The replica that ran this request has died; send it again.",
    "type": "server_error",
    "param": None,
    "code": "replica_lost",
}


class Retryable:
    """Middleware of Ray's proxy: a request whose replica died gets 503 with Retry-After, its stream an `error` event.

    Without it the client sees a bare 500 or a cut connection and cannot tell whether to try again.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything through and notice whether an answer began and ended."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = ended = events = False

        async def watch(message: Message) -> None:
            nonlocal started, ended, events
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(raw=list(message["headers"]))
                events = headers.get("content-type", "").startswith("text/event-stream")
                for request_id in headers.getlist("x-request-id")[:1]:
                    headers["x-request-id"] = request_id  # Ray's proxy adds the same a second time
                message = {**message, "headers": headers.raw}
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        await self.app(scope, receive, watch)
        body = json.dumps({"error": LOST})
        if not started:
            request_id = Headers(scope=scope).get("x-request-id", "")
            fields = {"content-type": "application/json", "retry-after": RETRY_AFTER, "x-request-id": request_id}
            raw = [(name.encode(), value.encode()) for name, value in fields.items()]
            await send({"type": "http.response.start", "status": 503, "headers": raw})
            await send({"type": "http.response.body", "body": body.encode()})
        elif events and not ended:
            await send({"type": "http.response.body", "body": f"event: error\r\ndata: {body}\r\n\r\n".encode()})


def middlewares() -> list[Middleware]:
    """What RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=app.ray.proxy:middlewares puts in front of every proxy."""
    return [Middleware(Retryable)]
