"""The proxy's middleware: an answer that never came, one that broke off, and one that is left alone."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from app.ray.proxy import Retryable

EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]


def start(headers: list[tuple[bytes, bytes]]) -> Message:
    """The beginning of a good answer."""
    return {"type": "http.response.start", "status": 200, "headers": headers}


def chunk(body: bytes, more: bool) -> Message:
    """A part of a body."""
    return {"type": "http.response.body", "body": body, "more_body": more}


def through(*messages: Message) -> list[Message]:
    """What a client sees of a replica that says this and then is gone."""
    seen: list[Message] = []

    async def replica(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    async def receive() -> Message:
        raise AssertionError("not asked for")

    async def send(message: Message) -> None:
        seen.append(message)

    scope: dict[str, Any] = {"type": "http", "headers": [(b"x-request-id", b"abc")]}
    asyncio.run(Retryable(replica)(scope, receive, send))
    return seen


def test_no_answer_becomes_a_retryable_one() -> None:
    begin, body = through()
    assert begin["status"] == 503
    assert dict(begin["headers"]) == {
        b"content-type": b"application/json",
        b"retry-after": b"1",
        b"x-request-id": b"abc",
    }
    error = json.loads(body["body"])["error"]
    said = "The replica that ran this request has died; send it again."
    assert error == {"message": said, "type": "server_error", "param": None, "code": "replica_lost"}


def test_broken_stream_ends_with_an_error_event() -> None:
    *before, last = through(start(EVENTS), chunk(b"event: progress\r\ndata: {}\r\n\r\n", more=True))
    assert len(before) == 2
    name, data = last["body"].decode().strip().split("\r\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert not last.get("more_body", False)


@pytest.mark.parametrize(
    "messages",
    [
        (start([(b"content-type", b"application/json")]), chunk(b"{}", more=False)),
        (start(EVENTS), chunk(b"data: 1", more=True), chunk(b"", more=False)),
        (start([(b"content-type", b"image/png")]), chunk(b"half a picture", more=True)),
        (start([(b"content-type", b"text/plain")]), chunk(b"half a page", more=True)),
        (start([]), {"type": "http.response.body", "body": b""}),
        (start(EVENTS), {"type": "http.response.body", "body": b""}),
    ],
    ids=["whole", "whole stream", "bytes that broke off", "text that broke off", "no type", "a stream of nothing"],
)
def test_everything_else_passes_unchanged(messages: tuple[Message, ...]) -> None:
    assert through(*messages) == list(messages)


def test_request_id_comes_once() -> None:
    begin, _ = through(start([(b"x-request-id", b"abc"), (b"x-request-id", b"abc")]), chunk(b"", more=False))
    assert begin["headers"] == [(b"x-request-id", b"abc")]
