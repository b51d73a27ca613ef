"""What an attacker or a careless operator does to a server in a process of its own: the register, and the server.

An attack is a function from an `Arena` to an `Outcome`, registered by `@attack(point)`; its docstring is its name.
Those of the engine lie in `attack_engine.py`, those of the edge in `attack_edge.py`. `slipstream bench attack` runs
all, tests/e2e/test_attacks.py those that are `quick`: a few seconds at most beside the start of a server.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.soak import resident_bytes

START_SECONDS = 240.0
MIB = 2**20
PROMPT = "a large red ring on a white background"
LONG: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 250, "num_images": 10}
"""Work that lasts until somebody ends it."""


@dataclass(frozen=True)
class Outcome:
    """What came of an attack: a figure, what it may be, and whether the server held."""

    figure: str
    limit: str
    held: bool


@dataclass(frozen=True)
class Target:
    """A server in a process of its own."""

    url: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def resident(self) -> int:
        """Bytes that it holds."""
        return resident_bytes(self.process.pid)

    @property
    def logged(self) -> str:
        """What it has written to standard error."""
        return self.log.read_text(errors="replace")

    def metric(self, name: str) -> float:
        """The sum over all series of a metric, or the value of the one that is named with its labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        found = [line.rsplit(" ", 1) for line in lines if line.startswith(f"slipstream_{name}")]
        wanted = f"slipstream_{name}"
        return sum(float(value) for series, value in found if wanted in (series, series.partition("{")[0]))

    def until(self, condition: Callable[[], bool], seconds: float = 30.0) -> float:
        """Wait for something to become true; the seconds that took. TimeoutError where it does not."""
        return until(condition, seconds)

    def connect(self) -> socket.socket:
        """A connection on which nothing has been said."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def busy(self, clients: int = 1) -> list[Client]:
        """Clients with long work that is being done."""
        asking = [Client(self.url, LONG) for _ in range(clients)]
        self.until(lambda: self.metric("requests_running") + self.metric("requests_waiting") >= clients)
        return asking

    def stop(self, *signals: int, seconds: float = 60.0) -> int:
        """Send signals, each when the one before has been noticed; the exit code, negative for a signal that killed."""
        for i, number in enumerate(signals, 1):
            self.process.send_signal(number)
            if i < len(signals):
                self.until(lambda: httpx.get(f"{self.url}/health/ready").status_code != 200)
        return self.process.wait(seconds)


class Client:
    """One request on a thread of its own, and how it ended."""

    def __init__(self, url: str, body: dict[str, Any], timeout: float = 120.0) -> None:
        self.status = 0
        self.text = ""
        self.failure: Exception | None = None
        self._url, self._body, self._timeout = f"{url}/generate", body, timeout
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            answer = httpx.post(self._url, json=self._body, timeout=self._timeout)
        except Exception as error:
            self.failure = error
        else:
            self.status, self.text = answer.status_code, answer.text

    def ended(self) -> Client:
        """Wait for the end."""
        self._thread.join()
        return self

    @property
    def typed(self) -> bool:
        """Whether the answer was a picture or an error in our shape."""
        return self.status == 200 or (self.status >= 400 and '"code"' in self.text)


class Arena:
    """Where servers are attacked: which models they serve, and where their logs go."""

    def __init__(self, models: Sequence[str], folder: Path) -> None:
        self._models = models
        self._folder = folder
        self._count = itertools.count()

    def command(self, **settings: Any) -> list[str]:
        """The command that serves."""
        given = {"model": ",".join(self._models), "torch_threads": 1, "max_rows": 8, "log_format": "json", **settings}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        return [sys.executable, "-m", "app.cli", "serve", *flags]

    @contextmanager
    def server(self, *, ready: bool = True, **settings: Any) -> Iterator[Target]:
        """A server, ready to work unless that is not asked for."""
        port = settings.pop("port", None) or free_port()
        log = self._folder / f"server-{next(self._count)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(self.command(port=port, **settings), stderr=out, env=dict(os.environ))
        target = Target(f"http://127.0.0.1:{port}", port, process, log)
        try:
            until(lambda: self._answers(target, "ready" if ready else "live"), START_SECONDS)
            yield target
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()

    def _answers(self, target: Target, health: str) -> bool:
        if target.process.poll() is not None:
            raise RuntimeError(f"the server ended with {target.process.returncode}: {target.logged[-2000:]}")
        try:
            return httpx.get(f"{target.url}/health/{health}").status_code == 200
        except httpx.TransportError:
            return False


@dataclass(frozen=True)
class Attack:
    """One attack: the point of the list that it belongs to, its name, and what it does."""

    point: int
    name: str
    run: Callable[[Arena], Outcome]
    quick: bool


ATTACKS: list[Attack] = []
"""Every attack, in the order of the modules that were imported."""


def attack(point: int, *, quick: bool = False) -> Callable[[Callable[[Arena], Outcome]], Callable[[Arena], Outcome]]:
    """Register a function as an attack; `quick` ones run in the test-suite too."""

    def register(function: Callable[[Arena], Outcome]) -> Callable[[Arena], Outcome]:
        name = (function.__doc__ or function.__name__).strip().splitlines()[0].rstrip(".")
        ATTACKS.append(Attack(point, name, function, quick))
        return function

    return register


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], bool], seconds: float = 30.0) -> float:
    """Wait for something to become true; the seconds that took. TimeoutError where it does not."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise TimeoutError("it did not come true")
        time.sleep(0.02)
    return time.monotonic() - began
