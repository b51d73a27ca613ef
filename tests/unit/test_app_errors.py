"""Every error by its status, kind, outcome and code, and what is said of errors that are not ours."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from app import errors
from app.errors import Impossible, ServiceError
from app.http.problems import answer, invalid, translate
from app.http.record import Record
from models.errors import AcceleratorConflict, OutOfRange, RequestError, StudentConflict, WrongBackbone

TABLE = {
    "ServiceError": (500, "server_error", "error", "internal_error"),
    "Malformed": (400, "invalid_request_error", "invalid", "malformed"),
    "AdminOnly": (403, "permission_error", "unauthorized", "admin_only"),
    "Unauthorized": (401, "authentication_error", "unauthorized", "invalid_api_key"),
    "NotFound": (404, "not_found_error", "invalid", "not_found"),
    "ModelNotFound": (404, "not_found_error", "invalid", "model_not_found"),
    "StoreOff": (404, "not_found_error", "invalid", "store_off"),
    "MethodNotAllowed": (405, "invalid_request_error", "invalid", "method_not_allowed"),
    "Conflict": (409, "conflict_error", "invalid", "conflict"),
    "IdempotencyConflict": (409, "conflict_error", "invalid", "idempotency_conflict"),
    "RequestTimeout": (408, "invalid_request_error", "invalid", "request_timeout"),
    "UnsupportedEncoding": (415, "invalid_request_error", "invalid", "unsupported_encoding"),
    "TooLarge": (413, "invalid_request_error", "invalid", "body_too_large"),
    "Impossible": (422, "invalid_request_error", "invalid", "invalid_value"),
    "QueueFull": (429, "rate_limit_error", "rejected", "queue_full"),
    "ClientGone": (499, "client_error", "cancelled", "client_gone"),
    "Internal": (500, "server_error", "error", "internal_error"),
    "ForwardFailed": (500, "server_error", "error", "forward_failed"),
    "OutOfMemory": (500, "server_error", "error", "out_of_memory"),
    "NonFinite": (500, "server_error", "error", "non_finite"),
    "Unavailable": (503, "server_error", "rejected", "internal_error"),
    "Loading": (503, "server_error", "rejected", "loading"),
    "Draining": (503, "server_error", "rejected", "draining"),
    "Overloaded": (503, "server_error", "rejected", "overloaded"),
    "EngineDead": (503, "server_error", "rejected", "engine_dead"),
    "DeadlineExceeded": (504, "timeout_error", "deadline", "deadline_exceeded"),
    "ModelChanged": (500, "server_error", "error", "model_changed"),
    "JobCrashed": (500, "server_error", "error", "job_crashed"),
    "StoreFailed": (500, "server_error", "error", "store_failed"),
    "FileGone": (500, "server_error", "error", "store_failed"),
    "StoreUnavailable": (503, "server_error", "rejected", "store_unavailable"),
    "StoreFull": (507, "server_error", "rejected", "store_full"),
}


def all_errors() -> list[type[ServiceError]]:
    found = [ServiceError]
    for kind in found:
        found.extend(kind.__subclasses__())
    return [kind for kind in found if kind.__module__ == errors.__name__]


def test_the_tree() -> None:
    assert {kind.__name__: (kind.status, kind.kind, kind.outcome, kind.code) for kind in all_errors()} == TABLE


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_an_answer(kind: type[ServiceError]) -> None:
    status, type_, _, code = TABLE[kind.__name__]
    found = answer(kind("why", param="seed", retry_after=7))
    assert (found.status_code, found.media_type) == (status, "application/json")
    error = {"message": "why", "type": type_, "param": "seed", "code": code}
    assert json.loads(bytes(found.body)) == {"error": error}
    assert found.headers["retry-after"] == "7"
    assert found.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
    assert "retry-after" not in answer(kind("why")).headers


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_a_record_of_it(kind: type[ServiceError]) -> None:
    status, _, outcome, code = TABLE[kind.__name__]
    record = Record("id")
    record.failed(kind("why", param="seed"))
    assert (record.status, record.outcome, record.code, record.error) == (status, outcome, code, "why")


def test_a_fresh_record() -> None:
    record = Record("id")
    assert (record.request_id, record.endpoint, record.status, record.code, record.error) == ("id", "", 0, "", "")
    assert (record.outcome, record.model, record.acceleration, record.facts) == ("ok", "unknown", "unknown", {})


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (OutOfRange, "out_of_range"),
        (WrongBackbone, "wrong_backbone"),
        (AcceleratorConflict, "accelerator_conflict"),
        (StudentConflict, "student_conflict"),
        (RequestError, "request_error"),
    ],
)
def test_the_librarys_refusals(kind: type[RequestError], code: str) -> None:
    error = translate(kind("seed", "too much"))
    assert (type(error), error.status, error.param, error.code) == (Impossible, 422, "seed", code)
    assert error.message == "seed: too much"
    assert Impossible("x").code == "invalid_value", "the code is the refusal's alone"


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (errors.QueueFull("full"), errors.QueueFull, "full"),
        (HTTPException(404), errors.NotFound, "there is nothing at this address"),
        (HTTPException(405), errors.MethodNotAllowed, "this address does not take this method"),
        (HTTPException(413), errors.TooLarge, "the body is larger than this server takes"),
        (HTTPException(400, "no form"), errors.Malformed, "no form"),
        (HTTPException(499, "odd"), errors.Malformed, "odd"),
        (HTTPException(500, "secret"), errors.Internal, "an internal error"),
        (RuntimeError("secret"), errors.Internal, "an internal error"),
    ],
)
def test_other_errors(raised: Exception, kind: type[ServiceError], message: str) -> None:
    error = translate(raised)
    assert type(error) is kind
    assert error.message.startswith(message)
    assert "secret" not in error.message


def detail(kind: str, *loc: str | int, message: str = "Value error, Bad thing", **more: Any) -> dict[str, Any]:
    return {"type": kind, "loc": loc, "msg": message, **more}


@pytest.mark.parametrize(
    ("given", "status", "param", "code", "message"),
    [
        (detail("missing", "body", "prompt"), 422, "prompt", "missing", "prompt: bad thing"),
        (detail("value_error", "body", "seed"), 422, "seed", "invalid_value", "seed: bad thing"),
        (detail("x", "body", "seed", message="Input Should"), 422, "seed", "invalid_value", "seed: input Should"),
        (detail("extra_forbidden", "body", "sede"), 422, "sede", "unknown_field", "sede: is not a known field"),
        (detail("extra_forbidden", "sede"), 422, "sede", "unknown_field", "sede: is not a known field"),
        (
            detail("extra_forbidden", "body", "acceleration", "one", "deepcache", "x"),
            422, "acceleration.x", "unknown_field", "acceleration.x: is not a known field",
        ),
        (
            detail("extra_forbidden", "body", "acceleration", "one", "deepcache", "plan"),
            422, "acceleration.plan", "unknown_field", "acceleration.plan: is not a known field",
        ),
        (
            detail("x", "body", "acceleration", "many", 1, "deepcache", "interval"),
            422, "acceleration.interval", "invalid_value", "acceleration.interval: bad thing",
        ),
        (detail("missing", "body"), 400, None, "malformed", "the body must be a JSON object"),
        (detail("x", "body", 3), 400, None, "malformed", "the body must be a JSON object"),
        (
            detail("json_invalid", "body", 3, ctx={"error": "no comma"}),
            400, None, "malformed", "the body is not valid JSON: no comma",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_body(
    given: dict[str, Any], status: int, param: str | None, code: str, message: str
) -> None:
    error = invalid([given, detail("missing", "body", "width")])
    assert (error.status, error.param, error.code) == (status, param, code)
    assert error.message.startswith(message)
    assert translate(RequestValidationError([given])).code == code
