"""Around every request: its id, its line in the log, the keys, and what is answered where nobody foresaw it."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from app.engine.job import Failed
from app.errors import ForwardFailed
from app.http.intake import Bodies, Intake
from app.http.middleware import CUT_OFF, ID, SAFE_HEADERS, Authorize, Head, Observe
from app.logs import REQUESTS
from app.metrics import Metrics
from app.settings import Settings
from tests.faked import faked
from tests.serving import aio


class Lines(logging.Handler):
    """Keeps what was logged of requests."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def last(self) -> dict[str, Any]:
        """The facts of the latest line, with its level."""
        record = self.records[-1]
        return {"level": record.levelname, **record.facts}  # type: ignore[attr-defined]


@pytest.fixture
def lines() -> Any:
    handler, level = Lines(), REQUESTS.level
    REQUESTS.addHandler(handler)
    REQUESTS.setLevel(logging.DEBUG)
    yield handler
    REQUESTS.removeHandler(handler)
    REQUESTS.setLevel(level)


@aio
async def test_what_is_logged(monkeypatch: pytest.MonkeyPatch, lines: Lines) -> None:
    async with faked(monkeypatch) as served:
        await served.post(headers={"X-Request-Id": "a.b:c_d-9"}, acceleration={"mode": "deepcache"})
        seconds = lines.last.pop("seconds")
        assert 0 <= seconds < 60
        common = {"request_id": "a.b:c_d-9", "method": "POST", "path": "/generate", "seconds": seconds}
        ran = {"model": "unet", "acceleration": "deepcache"}
        assert lines.last == {"level": "INFO", "status": 200, "outcome": "ok", **common, **ran}
        await served.post(headers={"X-Request-Id": "a.b:c_d-9"}, num_images=999, acceleration={"mode": "deepcache"})
        refused = lines.last | {"seconds": seconds}
        said = {"code": "invalid_value", "error": "num_images: 999 is more than this server's 10"}
        assert refused == {"level": "INFO", "status": 422, "outcome": "invalid", **common, **ran, **said}
        served.engine.script = [Failed(ForwardFailed("it broke"))]
        await served.post(stream=True)
        assert (lines.last["status"], lines.last["outcome"], lines.last["code"]) == (200, "error", "forward_failed")
        await served.client.get("/v1/models")
        assert (lines.last["level"], lines.last["method"], lines.last["status"]) == ("DEBUG", "GET", 200)
        assert not {"model", "acceleration", "outcome", "code"} & set(lines.last)
        await served.client.get("/nowhere")
        assert (lines.last["level"], lines.last["path"], lines.last["status"]) == ("INFO", "/nowhere", 404)
        served.engine.refusal = ForwardFailed("sick")
        await served.client.get("/health/ready")
        assert (lines.last["level"], lines.last["status"]) == ("DEBUG", 500)
    assert len(lines.records) == 6


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("a", True),
        ("A.b:c_d-9", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("a b", False),
        ("a/b", False),
        ("", False),
        ("a\n", False),
    ],
)
def test_request_ids(given: str, taken: bool) -> None:
    assert bool(ID.fullmatch(given)) == taken


async def ask(app: Any, path: str = "/", headers: dict[str, str] | None = None, body: bytes = b"") -> httpx.Response:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post(path, headers=headers, content=body)


@aio
async def test_every_request_gets_an_id_and_safe_headers() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"x-frame-options", b"SAMEORIGIN")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": scope["state"]["record"].request_id.encode()})

    observed = Observe(app, Metrics(), cors=False)
    first, second = await ask(observed), await ask(observed)
    assert first.text == first.headers["x-request-id"] != second.text == second.headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", first.text)
    assert (await ask(observed, headers={"X-Request-Id": "mine"})).text == "mine"
    assert first.headers["x-frame-options"] == "SAMEORIGIN", "what the app says itself stays"
    others = {k: v for k, v in SAFE_HEADERS.items() if k != "X-Frame-Options"}
    assert {name: first.headers[name] for name in others} == others
    crossed = await ask(Observe(app, Metrics(), cors=True))
    assert "cross-origin-resource-policy" not in crossed.headers
    assert "cross-origin-opener-policy" in crossed.headers


@aio
async def test_what_nobody_foresaw_is_an_error_of_the_server(lines: Lines) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise LookupError("secret")

    metrics = Metrics()
    answer = await ask(Observe(broken, metrics, cors=False), "/generate", {"X-Request-Id": "mine"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert answer.headers["x-request-id"] == "mine"
    assert "secret" not in answer.text
    labels = {"endpoint": "/generate", "model": "unknown", "acceleration": "unknown", "outcome": "error"}
    assert metrics.registry.get_sample_value("slipstream_requests_total", labels) == 1
    assert lines.records[0].exc_info is not None
    assert lines.records[0].facts == {"request_id": "mine"}  # type: ignore[attr-defined]
    assert (lines.last["status"], lines.last["code"]) == (500, "internal_error")


@aio
async def test_what_breaks_after_its_start_is_not_answered_twice(lines: Lines) -> None:
    sent: list[Message] = []

    async def half(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise raised[-1]

    async def receive() -> Message:
        raise AssertionError("not asked for")

    async def send(message: Message) -> None:
        sent.append(message)

    raised: list[Exception] = []
    for error, outcome in ((LookupError("secret"), "error"), (BrokenPipeError(), "cancelled")):
        raised.append(error)
        sent.clear()
        scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
        await Observe(half, Metrics(), cors=False)(scope, receive, send)
        assert [message["type"] for message in sent] == ["http.response.start"]
        assert lines.last["outcome"] == outcome


@aio
@pytest.mark.parametrize("ending", [False, True])
async def test_a_cancelled_call_is_answered_only_at_the_end_of_the_process(ending: bool, lines: Lines) -> None:
    async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(3600)

    app = Observe(waiting, Metrics(), cors=False, ending=lambda: ending)
    call = asyncio.ensure_future(ask(app, "/generate"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    call.cancel()
    if ending:
        answer = await call
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
    else:
        with pytest.raises(asyncio.CancelledError):
            await call
        assert (lines.last["code"], lines.last["outcome"]) == ("client_gone", "cancelled")


@aio
async def test_only_posts_to_generating_routes_are_counted() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["state"]["record"].endpoint)

    async def nothing(*_: Any) -> Any:
        return None

    seen: list[str] = []
    observed = Observe(app, Metrics(), cors=False)
    for method, path in (
        ("POST", "/generate"),
        ("POST", "/v1/images/generations"),
        ("POST", "/v1/images/edits"),
        ("POST", "/prefix/generate"),
        ("GET", "/generate"),
        ("POST", "/v1/models"),
    ):
        root = "/prefix" if path.startswith("/prefix") else ""
        scope = {"type": "http", "method": method, "path": path, "root_path": root, "headers": []}
        await observed(scope, nothing, nothing)
    assert seen == ["/generate", "/v1/images/generations", "/v1/images/edits", "/generate", "", ""]


@aio
async def test_keys_and_open_paths() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    guarded = Observe(Authorize(app, ["good", "bétter"], ("/health/", "/", "/metrics")), Metrics(), cors=False)
    for path, given, status in (
        ("/health/live", None, 204),
        ("/", None, 204),
        ("/metrics", None, 204),
        ("/metrics/more", None, 401),
        ("/healthy", None, 401),
        ("/generate", None, 401),
        ("/generate", "Bearer good", 204),
        ("/generate", "BEARER   good", 204),
        ("/generate", "Bearer goo", 401),
        ("/generate", "Bearer goodgood", 401),
        ("/generate", "Basic good", 401),
        ("/generate", "Bearer", 401),
    ):
        answer = await ask(guarded, path, {} if given is None else {"Authorization": given})
        assert answer.status_code == status, (path, given)
        assert answer.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
    refused = (await ask(guarded, "/generate")).json()["error"]
    assert (refused["type"], refused["code"], refused["param"]) == ("authentication_error", "invalid_api_key", None)


def limiting(app: Any, **settings: Any) -> Observe:
    """`Intake` inside of what it needs around it."""
    metrics, given = Metrics(), Settings(**settings)
    bodies = Bodies(given.max_inflight_bytes, metrics.body_bytes)
    return Observe(Intake(app, given, metrics, bodies), metrics, cors=False)


@aio
async def test_a_declared_size_is_refused_before_a_byte_is_read() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        asked.append(scope["path"])

    async def receive() -> Message:
        raise AssertionError("not read")

    async def send(message: Message) -> None:
        sent.append(message)

    asked: list[str] = []
    sent: list[Message] = []
    limited = limiting(app, max_body_bytes=1024)
    for declared, status in ((b"1025", 413), (b"9" * 5000, 413)):
        sent.clear()
        headers = [(b"content-length", declared)]
        await limited({"type": "http", "method": "POST", "path": declared.decode(), "headers": headers}, receive, send)
        assert [m["status"] for m in sent if "status" in m] == ([] if status is None else [status])
    assert asked == []


async def answered(app: Any, method: str = "GET") -> list[Message]:
    """What an app sends."""
    sent: list[Message] = []

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    async with asyncio.timeout(10):
        await app({"type": "http", "method": method, "path": "/x", "headers": []}, receive, send)
    return sent


@aio
async def test_head_of_a_stream_without_end_is_answered_and_the_stream_given_up() -> None:
    ended = asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["method"] == "GET"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-kind", b"stream")]})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"more", "more_body": True})
                await asyncio.sleep(0)
        finally:
            ended.set()

    start, body = await answered(Head(endless), "HEAD")
    assert (start["status"], start["headers"]) == (200, [(b"x-kind", b"stream")])
    assert body == {"type": "http.response.body", "body": b"", "more_body": False}
    assert ended.is_set()


@aio
async def test_head_fails_as_get_does() -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await answered(Head(failing), "HEAD")


@pytest.mark.parametrize("message", [CUT_OFF, None])
@aio
async def test_who_is_cut_off_by_a_server_of_another_kind_is_told_so(message: str | None) -> None:
    """uvicorn by itself cancels handlers that take too long at its end; others cancel because nobody listens."""
    running = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        running.set()
        await asyncio.Event().wait()

    answering = asyncio.ensure_future(answered(Observe(slow, Metrics(), cors=False)))
    await running.wait()
    answering.cancel(*([message] if message else []))
    if message is None:
        with pytest.raises(asyncio.CancelledError):
            await answering
        return
    start, body = await answering
    assert (start["status"], b'"draining"' in body["body"]) == (503, True)
