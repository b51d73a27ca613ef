"""JSON bodies that are let go of once they are understood: FastAPI would keep them until the answer is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response


class BodyRequest(Request):
    """A request whose body is parsed as it is read, and not kept as bytes."""

    _unparsed: bytes = b""
    _parsed: Any = None

    async def body(self) -> bytes:
        """Something where there is a body, which is what FastAPI asks it for: `json` has what it says."""
        self._unparsed = b"".join([chunk async for chunk in self.stream()])
        return b"1" if self._unparsed else b""

    async def json(self) -> Any:
        """The body, parsed. Raises `json.JSONDecodeError`."""
        data, self._unparsed = self._unparsed, b""
        self._parsed = json.loads(data)
        return self._parsed

    def forget(self, field: str) -> None:
        """Let go of the value of one field, whoever still has the parsed body."""
        if isinstance(self._parsed, dict):
            self._parsed[field] = None


class BodyRoute(APIRoute):
    """A route whose handler is given a `BodyRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, with our request."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(BodyRequest(request.scope, request.receive))

        return handle
