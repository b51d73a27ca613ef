"""The server's reaction to signals, to time that passes and to an engine that dies, without a socket or a process."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI

from app import serve
from app.http.intake import Bodies
from app.metrics import Metrics
from app.serve import CUT_SECONDS, Server
from app.settings import Settings


class FakeEngine:
    """Says what it is told to say, and notes what it is asked to do."""

    def __init__(self, state: str = "ready", jobs: int = 0) -> None:
        self.state, self.jobs = state, jobs
        self.asked: list[str] = []
        self.failure: Exception | None = None
        self.backbones: Mapping[str, Any] = {"unet": SimpleNamespace(device="cpu"), "dit": SimpleNamespace(device="x")}

    @property
    def ready(self) -> bool:
        """As the real one."""
        return self.state == "ready"

    def drain(self) -> None:
        """Take no more."""
        self.asked.append("drain")

    ended = True

    def close(self, timeout: float = 10.0) -> None:
        """Answer everybody."""
        self.asked.append(f"close {timeout:g}")


class Clock:
    """Stands in for the module `time`."""

    now = 50.0

    def monotonic(self) -> float:
        """Seconds."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The server's clock."""
    found = Clock()
    monkeypatch.setattr(serve, "time", found)
    return found


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the server logs."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, keep = logging.getLogger("slipstream.server"), Keep()
    level = logger.level
    logger.addHandler(keep)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(keep)
    logger.setLevel(level)


def server_of(engine: FakeEngine, address: tuple[Any, ...] = ("127.0.0.1", 8123), **settings: Any) -> Server:
    app = FastAPI()
    app.state.engine, app.state.metrics = engine, Metrics()
    app.state.bodies = Bodies(1, app.state.metrics.body_bytes)
    server = Server(app, Settings(**settings))
    sockets = [SimpleNamespace(getsockname=lambda: address)]
    server.servers = [SimpleNamespace(sockets=sockets)]  # type: ignore[list-item]
    return server


def ends(server: Server) -> bool:
    """Whether the next tenth of a second is the last."""
    return asyncio.run(server.on_tick(1))


def term(server: Server) -> None:
    server.handle_exit(signal.SIGTERM, None)


@pytest.mark.parametrize("jobs", [0, 3])
@pytest.mark.parametrize("state", ["loading", "ready"])
def test_without_a_signal_it_goes_on(state: str, jobs: int) -> None:
    engine = FakeEngine(state, jobs)
    server = server_of(engine)
    assert not ends(server)
    assert engine.asked == []


@pytest.mark.parametrize("state", ["loading", "ready"])
def test_the_first_signal_drains_and_waits_for_every_job(state: str, clock: Clock) -> None:
    engine = FakeEngine(state, jobs=2)
    server = server_of(engine, drain_seconds=60)
    assert not ends(server)
    term(server)
    assert engine.asked == [], "not inside of the signal: this thread may hold the engine's lock"
    assert not ends(server)
    assert engine.asked == ["drain"]
    clock.now += 60
    engine.jobs = 1
    assert not ends(server)
    engine.jobs = 0
    assert ends(server)
    assert set(engine.asked) == {"drain"}
    assert (server.exit_code, server.should_exit, server.force_exit) == (0, False, False)


def test_a_drain_is_cut_off_when_its_time_is_over(clock: Clock, said: list[str]) -> None:
    engine = FakeEngine(jobs=2)
    server = server_of(engine, drain_seconds=7)
    clock.now = 100
    term(server)
    clock.now = 107
    assert not ends(server)
    clock.now = 107.1
    assert ends(server)
    assert engine.asked == ["drain", "drain", "close 1"]
    assert said[-1] == "2 requests are cut off: drain_seconds have passed"
    assert server.exit_code == 0


def test_late_and_done_cuts_nobody_off(clock: Clock, said: list[str]) -> None:
    engine = FakeEngine()
    server = server_of(engine, drain_seconds=7)
    term(server)
    clock.now += 8
    assert ends(server)
    assert engine.asked == ["drain"]
    assert not any("cut off" in line for line in said)


def test_the_second_signal_ends_at_once() -> None:
    engine = FakeEngine(jobs=2)
    server = server_of(engine, drain_seconds=60)
    term(server)
    assert not ends(server)
    server.handle_exit(signal.SIGINT, None)
    assert ends(server)
    assert (server.exit_code, server.force_exit) == (128 + signal.SIGINT, False)
    assert engine.asked[-1] == "close 1", "everybody is answered"
    assert server.config.timeout_graceful_shutdown == CUT_SECONDS
    server.handle_exit(signal.SIGINT, None)
    assert server.force_exit, "the third does not even wait for answers to be sent"


@pytest.mark.parametrize("drains", [False, True])
def test_a_dead_engine_ends_the_process_with_1(drains: bool) -> None:
    engine = FakeEngine("dead", jobs=1)
    server = server_of(engine)
    if drains:
        term(server)
    assert ends(server)
    assert server.exit_code == 1


def test_it_says_once_that_it_is_ready(said: list[str]) -> None:
    engine = FakeEngine("loading")
    server = server_of(engine)
    ends(server)
    assert said == []
    engine.state = "ready"
    for _ in range(3):
        ends(server)
    url = "http://127.0.0.1:8123"
    assert said == [f"ready: unet on cpu, dit on x; playground at {url}/, API at {url}/docs"]


@pytest.mark.parametrize(
    ("address", "expected"),
    [(("127.0.0.1", 8000), "http://127.0.0.1:8000"), (("::1", 9000, 0, 0), "http://[::1]:9000")],
)
def test_its_address(address: tuple[Any, ...], expected: str) -> None:
    assert server_of(FakeEngine(), address).address == expected


def test_how_it_listens() -> None:
    config = server_of(FakeEngine(), host="0.0.0.0", port=1234).config
    assert (config.host, config.port) == ("0.0.0.0", 1234)
    assert (config.log_config, config.access_log, config.server_header) == (None, False, False)
    assert config.timeout_graceful_shutdown == 10


@pytest.mark.parametrize(
    ("started", "exit_code", "failure", "expected"),
    [
        (True, 0, None, 0),
        (True, 1, OSError("no such model"), 1),
        (False, 0, None, 1),
        (False, 0, OSError("no such model"), 1),
    ],
)
def test_the_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
    started: bool,
    exit_code: int,
    failure: Exception | None,
    expected: int,
) -> None:
    app = FastAPI()
    configured: list[Settings] = []
    app.state.engine, app.state.metrics = FakeEngine(), Metrics()
    app.state.bodies = Bodies(1, app.state.metrics.body_bytes)
    app.state.engine.failure = failure
    settings = Settings(port=0)

    def run(self: Server, sockets: list[socket.socket]) -> None:
        self.started, self.exit_code = started, exit_code
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    quiet: list[str] = []
    for library in ("diffusers", "transformers"):
        calls = SimpleNamespace(
            disable_progress_bar=lambda name=library: quiet.append(f"{name}: no bars"),
            set_verbosity_error=lambda name=library: quiet.append(f"{name}: errors only"),
        )
        monkeypatch.setattr(serve, library, SimpleNamespace(utils=SimpleNamespace(logging=calls)))
    monkeypatch.setattr(serve, "create_app", lambda given: app if given is settings else None)
    monkeypatch.setattr(serve, "configure", configured.append)
    monkeypatch.setattr(Server, "run", run)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert serve.serve(settings) == expected
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert configured == [settings]
    assert quiet == [f"{name}: {what}" for name in ("diffusers", "transformers") for what in ("no bars", "errors only")]
    assert said == ([] if failure is None else ["no such model"])
