"""The one place where errors become HTTP: OpenAI's shape, the status of the tree, Retry-After where there is one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from app.errors import Impossible, Internal, Malformed, MethodNotAllowed, NotFound, ServiceError, TooLarge
from app.http.schemas.batches import FIELD_NAMES as BATCH_FIELDS
from app.http.schemas.jobs import FIELD_NAMES as JOB_FIELDS
from app.http.schemas.requests import FIELD_NAMES
from app.http.schemas.responses import ErrorBody
from models.errors import RequestError, cut

RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "Malformed body.",
        401: "No valid key.",
        404: "No such model.",
        413: "Body too large.",
        422: "Well-formed but not possible; `param` names the field.",
        429: "Queue full; `Retry-After` is the predicted time until it has drained.",
        500: "The server failed on this request.",
        503: "Loading, draining or dead; see `Retry-After`.",
        504: "Deadline exceeded.",
    }.items()
}
"""For the OpenAPI description of the generating routes."""


KNOWN_FIELDS = FIELD_NAMES | JOB_FIELDS | BATCH_FIELDS
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


def answer(error: ServiceError, allow: Sequence[str] = ()) -> Response:
    """An error as a response; `allow` are the methods that the address takes."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if allow:
        headers["Allow"] = ", ".join(allow)
    if error.status == 415:
        headers["Accept-Encoding"] = "gzip, deflate"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(json.dumps(body(error)), error.status, headers, media_type="application/json")


def body(error: ServiceError) -> dict[str, Any]:
    """An error as OpenAI spells it."""
    detail = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
    return {"error": detail}


def translate(error: Exception) -> ServiceError:
    """Any exception as one of the tree; what nobody foresaw is `Internal`."""
    match error:
        case ServiceError():
            return error
        case RequestError():
            return Impossible.of(error)
        case RequestValidationError():
            return invalid(error.errors())
        case HTTPException(status_code=404):
            return NotFound("there is nothing at this address")
        case HTTPException(status_code=405):
            return MethodNotAllowed("this address does not take this method")
        case HTTPException(status_code=413):
            return TooLarge("the body is larger than this server takes")
        case HTTPException(status_code=status) if status < 500:
            return Malformed(str(error.detail))
    return Internal("an internal error; the server's log has it under this request's X-Request-Id")


def invalid(errors: Sequence[ErrorDetails | dict[str, Any]]) -> ServiceError:
    """The first of pydantic's errors: 400 where the body is not even JSON, else 422 with the field."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return Malformed(f"the body is not valid JSON: {first.get('ctx', {}).get('error', '')}")
    unknown = first["type"] == "extra_forbidden"
    pairs = zip((None, *first["loc"]), first["loc"], strict=False)
    path = [str(part) for before, part in pairs if part in KNOWN_FIELDS or (before == "control" and part != "body")]
    path = path or _together(first)
    if unknown:
        path = [*path, cut(str(first["loc"][-1]))] if first["loc"][-1] not in path[-1:] else path
    if not path:
        return Malformed("the body must be a JSON object, sent as application/json")
    error = Impossible(
        f"{'.'.join(path)}: {'is not a known field' if unknown else _reason(first)}", param=".".join(path)
    )
    error.code = "unknown_field" if unknown else "missing" if first["type"] == "missing" else "invalid_value"
    return error


def _together(error: ErrorDetails | dict[str, Any]) -> list[str]:
    """The field at fault where several do not fit together."""
    field = error.get("ctx", {}).get("field")
    return [field] if error["type"] == "conflict" and field is not None else []


def _reason(error: ErrorDetails | dict[str, Any]) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    if tag := error.get("ctx", {}).get("tag"):  # a mode that there is not, as the client wrote it
        message = message.replace(str(tag), cut(str(tag)))
    return message[:1].lower() + message[1:]


def _allowed(app: FastAPI, scope: Scope) -> list[str]:
    """The methods that an address takes; HEAD goes wherever GET does."""
    found = {
        method
        for method in METHODS
        for route in app.router.routes
        if route.matches({**scope, "method": method})[0] is Match.FULL
    }
    return [method for method in METHODS if method in found or (method == "HEAD" and "GET" in found)]


def install(app: FastAPI) -> None:
    """Answer every exception of a handler through `translate`; unforeseen ones are left to the outermost middleware."""

    async def respond(request: Request, error: Exception) -> Response:
        known = translate(error)
        request.state.record.failed(known)
        return answer(known, _allowed(app, request.scope) if known.status == 405 else ())

    for kind in (ServiceError, RequestError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, respond)
