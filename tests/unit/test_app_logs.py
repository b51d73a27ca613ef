"""Log lines to the letter, where they go, and what one request leaves in log and metrics."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app import logs
from app.errors import QueueFull
from app.http import middleware
from app.http.middleware import Observe
from app.logs import REQUESTS, Handler, HumanLines, JsonLines, configure
from app.metrics import Metrics
from app.settings import Settings
from tests.serving import aio

MOMENT = 1_700_000_000.25  # 2023-11-14 22:13:20 in Greenwich


def record(level: int = logging.WARNING, facts: dict[str, Any] | None = None, error: bool = False) -> logging.LogRecord:
    info = None
    if error:
        try:
            raise KeyError("lost")
        except KeyError:
            info = sys.exc_info()
    made = logging.LogRecord("slipstream.server", level, "", 0, "%d of %s", (3, "sd"), info)
    made.created, made.msecs = MOMENT, 7.9
    if facts is not None:
        made.facts = facts
    return made


def test_a_json_line_says_when_how_grave_who_and_what() -> None:
    line = json.loads(JsonLines().format(record(facts={"status": 200, "model": None, "file": Path("a/b")})))
    assert line == {
        "time": "2023-11-14T22:13:20.007Z",
        "level": "warning",
        "logger": "slipstream.server",
        "message": "3 of sd",
        "status": 200,
        "model": None,
        "file": "a/b",
    }
    assert list(line)[:4] == ["time", "level", "logger", "message"]


def test_a_json_line_has_the_traceback_in_it_where_there_is_one() -> None:
    text = JsonLines().format(record(error=True))
    assert "\n" not in text
    assert json.loads(text)["exception"].endswith("KeyError: 'lost'")
    assert "exception" not in json.loads(JsonLines().format(record()))


def test_a_human_line_has_the_facts_that_say_something() -> None:
    facts = {"status": 0, "model": "sd", "error": "", "code": None, "seconds": 1.5}
    clock = time.strftime("%H:%M:%S", time.localtime(MOMENT))
    assert HumanLines().format(record(facts=facts)) == f"{clock} WARNING 3 of sd status=0 model=sd seconds=1.5"
    assert HumanLines().format(record(logging.INFO)) == f"{clock} INFO    3 of sd"


def test_a_human_line_is_followed_by_the_traceback() -> None:
    first, *rest = HumanLines().format(record(facts={"status": 500}, error=True)).splitlines()
    assert first.endswith("3 of sd status=500")
    assert rest[0] == "  Traceback (most recent call last):"
    assert rest[-1] == "  KeyError: 'lost'"


@pytest.fixture
def restored() -> Iterator[None]:
    """The logging of the process as it was."""
    loggers = [logging.getLogger(name) for name in ("slipstream", "uvicorn", "py.warnings", "uvicorn.access")]
    before = [(one, one.handlers, one.propagate, one.level, one.disabled) for one in loggers]
    yield
    logging.captureWarnings(False)
    for one, handlers, propagate, level, disabled in before:
        one.handlers, one.propagate, one.disabled = handlers, propagate, disabled
        one.setLevel(level)


@pytest.mark.usefixtures("restored")
def test_a_log_file_is_added_to_and_takes_all_that_is_grave_enough(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("before\n")
    handler = configure(Settings(log_file=file, log_format="auto", log_level="warning"))
    for name in ("slipstream.request", "uvicorn.error"):
        logging.getLogger(name).info("too small")
        logging.getLogger(name).warning("kept by %s", name)
    logging.getLogger("uvicorn.access").error("requests are logged by the app itself")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("odd", stacklevel=1)
    handler.close()
    handler.stream.close()
    first, *lines = file.read_text().splitlines()
    assert first == "before"
    found = [(line["logger"], line["level"], line["message"]) for line in map(json.loads, lines)]
    assert found[:2] == [
        ("slipstream.request", "warning", "kept by slipstream.request"),
        ("uvicorn.error", "warning", "kept by uvicorn.error"),
    ]
    assert [(name, level) for name, level, _ in found[2:]] == [("py.warnings", "warning")]
    assert "odd" in found[2][2]


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    ("terminal", "form", "human"),
    [(True, "auto", True), (False, "auto", False), (True, "json", False), (False, "human", True)],
)
def test_words_for_a_terminal_and_json_for_machines(
    terminal: bool, form: str, human: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = os.openpty() if terminal else os.pipe()
    with os.fdopen(ends[0], "rb", buffering=0) as out, os.fdopen(ends[1], "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        handler = configure(Settings(log_format=form))
        logs.SERVER.info("here")
        line = out.read(1000).decode()
        handler.close()
    assert bool(re.fullmatch(r"\d\d:\d\d:\d\d INFO    here\r?\n", line)) == human
    assert line.startswith('{"time": ') != human


class Watched:
    """`Observe` around a small app, on a clock of its own, with the log lines that it wrote."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.metrics = Metrics()
        self.lines: list[tuple[int, str, dict[str, Any]]] = []
        self.now = 100.0
        patch.setattr(middleware, "time", SimpleNamespace(monotonic=lambda: self.now))
        handler = logging.Handler()
        handler.emit = lambda one: self.lines.append((one.levelno, one.getMessage(), one.facts))  # type: ignore[method-assign,assignment,attr-defined]
        patch.setattr(REQUESTS, "handlers", [handler])
        patch.setattr(REQUESTS, "propagate", False)
        patch.setattr(REQUESTS, "level", logging.DEBUG)
        REQUESTS.manager._clear_cache()  # type: ignore[attr-defined]

    async def ask(
        self, path: str, does: Callable[[Any], object] = lambda record: None, seconds: float = 0.0, **scope: Any
    ) -> list[dict[str, Any]]:
        """One request whose handler does something to its record, after some seconds; what was sent."""
        sent: list[dict[str, Any]] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            self.now += seconds
            found = scope["state"]["record"]
            does(found)
            await send({"type": "http.response.start", "status": found.status or 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b""}

        async def send(message: Any) -> None:
            sent.append(message)

        whole = {"type": "http", "method": "POST", "path": path, "headers": [(b"x-request-id", b"mine")], **scope}
        call: Awaitable[None] = Observe(app, self.metrics, cors=False)(whole, receive, send)
        await call
        return sent

    def counted(self) -> dict[str, float]:
        """The samples of the two metrics of requests that are not nought, by all they are told apart by."""
        names = ("slipstream_requests_total", "slipstream_request_duration_seconds_sum")
        return {
            " ".join([s.name.removeprefix("slipstream_"), *s.labels.values()]): s.value
            for family in self.metrics.registry.collect()
            for s in family.samples
            if s.name in names
        }


@aio
async def test_one_request_is_counted_and_logged_with_all_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)

    def known(record: Any) -> None:
        record.model, record.acceleration, record.facts = "sd", "deepcache", {"rows": 6}

    await watched.ask("/v1/images/generations", known, seconds=1.25)
    assert watched.counted() == {
        "requests_total /v1/images/generations sd deepcache ok": 1,
        "request_duration_seconds_sum sd deepcache ok": 1.25,
    }
    facts = {"request_id": "mine", "method": "POST", "path": "/v1/images/generations", "status": 200, "seconds": 1.25}
    facts |= {"model": "sd", "acceleration": "deepcache", "outcome": "ok", "rows": 6}
    assert watched.lines == [(logging.INFO, "request", facts)]


@aio
async def test_a_refused_request_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    await watched.ask("/generate", lambda record: record.failed(QueueFull("full")), seconds=0.123456)
    assert watched.counted() == {
        "requests_total /generate unknown unknown rejected": 1,
        "request_duration_seconds_sum unknown unknown rejected": pytest.approx(0.123456),
    }
    [(level, _, facts)] = watched.lines
    assert level == logging.INFO
    assert (facts["status"], facts["code"], facts["error"], facts["outcome"]) == (429, "queue_full", "full", "rejected")
    assert facts["seconds"] == 0.1235


@pytest.mark.parametrize(
    ("error", "status", "outcome", "code"),
    [
        (OSError("no space left"), 500, "error", "internal_error"),  # it is the server's: nothing was sent yet
        (ValueError("a bug"), 500, "error", "internal_error"),
    ],
)
def test_what_a_handler_raises_is_counted_by_whose_fault_it_is(
    error: Exception, status: int, outcome: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @aio
    async def test() -> None:
        watched = Watched(monkeypatch)

        def fails(record: Any) -> None:
            raise error

        sent = await watched.ask("/v1/images/edits", fails)
        assert next(iter(watched.counted())) == f"requests_total /v1/images/edits unknown unknown {outcome}"
        level, message, facts = watched.lines[-1]
        assert (level, message) == (logging.INFO, "request")
        assert (facts["status"], facts["code"]) == (status, code)
        unforeseen = [(level, facts) for level, message, facts in watched.lines if message == "unforeseen"]
        assert unforeseen == ([(logging.ERROR, {"request_id": "mine"})] if status == 500 else [])
        assert [m["status"] for m in sent if m["type"] == "http.response.start"] == ([500] if status == 500 else [])

    test()


@pytest.mark.parametrize(
    ("method", "path", "status", "level"),
    [
        ("GET", "/v1/models", 200, logging.DEBUG),
        ("GET", "/metrics", 401, logging.INFO),
        ("GET", "/generate", 405, logging.INFO),
        ("POST", "/generate/7", 404, logging.INFO),
        ("GET", "/health/ready", 503, logging.DEBUG),
        ("GET", "/", 399, logging.DEBUG),
    ],
)
def test_what_generates_nothing_is_logged_low_where_all_is_well_and_never_counted(
    method: str, path: str, status: int, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    @aio
    async def test() -> None:
        watched = Watched(monkeypatch)
        await watched.ask(path, lambda record: setattr(record, "status", status), seconds=2.0, method=method)
        assert watched.counted() == {}
        facts = {"request_id": "mine", "method": method, "path": path, "status": status, "seconds": 2.0}
        assert watched.lines == [(level, "request", facts)]

    test()


@aio
async def test_behind_a_prefix_routes_are_counted_by_their_own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    await watched.ask("/images/generate", root_path="/images")
    await watched.ask("/imagesgenerate", root_path="/images")
    assert next(iter(watched.counted())) == "requests_total /generate unknown unknown ok"
    assert sum(value for name, value in watched.counted().items() if name.startswith("requests_total")) == 1
    assert [facts["path"] for *_, facts in watched.lines] == ["/images/generate", "/imagesgenerate"]


@pytest.mark.usefixtures("restored")
def test_a_log_that_nobody_reads_holds_nobody_up_and_says_later_what_was_lost() -> None:
    out, into = os.pipe()
    with os.fdopen(out, "rb", buffering=0) as reader, os.fdopen(into, "w") as stream:
        handler = Handler(stream, capacity=10)
        handler.setFormatter(JsonLines())
        for i in range(200):
            handler.handle(logging.LogRecord("x", logging.INFO, "", 0, f"{i} {'x' * 2000}", (), None))
        lost = handler.lost
        assert lost > 100, "a pipe takes 64 KiB, the queue ten lines"
        kept = 200 - lost
        text, lines, said = b"", list[str](), list[str]()
        while len(lines) < kept or sum(int(line.split()[0]) for line in said) < lost:
            text += reader.read(100_000)
            whole = [json.loads(line)["message"] for line in text.decode().split("\n")[:-1]]
            said = [line for line in whole if line.endswith("log lines were lost: nobody took them in time")]
            lines = [line for line in whole if line not in said]
        assert sum(int(line.split()[0]) for line in said) == lost
        assert len(lines) == kept
        assert [int(line.split()[0]) for line in lines] == sorted(int(line.split()[0]) for line in lines)
        handler.close()


def test_a_human_line_obeys_nobody() -> None:
    line = HumanLines().format(record(facts={"path": "/a\n12:00:00 INFO forged", "model": "\x1b[2J\u202e"}))
    assert line.endswith("3 of sd path=/a\\n12:00:00 INFO forged model=\\x1b[2J\\u202e")
    one = record()
    try:
        raise KeyError("a\nb\x1bc")
    except KeyError:
        one.exc_info = sys.exc_info()
    one.msg, one.args = "first\nsecond", ()
    head, *trace = HumanLines().format(one).split("\n")
    assert head.endswith("first\\nsecond")
    assert all(part.startswith("  ") and part.isprintable() for part in trace)


def test_lines_are_bounded() -> None:
    one = record()
    one.msg, one.args = "x" * 10**6, ()
    assert len(JsonLines().format(one)) < 20_000
    assert len(HumanLines().format(one)) < 20_000
