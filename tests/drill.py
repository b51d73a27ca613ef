"""The drill: clients submit jobs while servers are killed with SIGKILL; nothing is lost, twice, or another picture."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

PROMPT = "a large red circle on a white background"
PROMPTS = (PROMPT, "a small blue star", "a green cross above a yellow ring on a black background", "")
JOBS = "/v1/images/jobs"
OVER = ("completed", "failed", "cancelled")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """`slipstream serve` on one port, started again and again with the same settings.

    `forked`: from a process that has imported everything already, which takes a second where a fresh one takes ten.
    """

    settings: dict[str, Any]
    log: Path
    forked: bool = False
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | BaseProcess | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll() is None
        return self.process is not None and self.process.is_alive()

    def start(self) -> None:
        """Start a process."""
        given = {"PORT": self.port, "LOG_FORMAT": "json", "TORCH_THREADS": 1, "MAX_ROWS": 16, "DTYPE": "float32"}
        given |= {name.upper(): value for name, value in self.settings.items()}
        if self.forked:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["app.serve", "app.jobs.service", "diffusers.models", "tests.drill"])
            values = {name.lower(): str(value) for name, value in given.items()}
            self.process = context.Process(target=serve_forked, args=(values, str(self.log)), daemon=True)
            self.process.start()
            return
        environment = os.environ | {f"SLIPSTREAM_{name}": str(value) for name, value in given.items()}
        with self.log.open("ab") as out:
            command = [sys.executable, "-m", "app.cli", "serve"]
            self.process = subprocess.Popen(command, env=environment, stderr=out)

    def wait(self, seconds: float = 120.0) -> None:
        """Until it takes work. Raises `RuntimeError` where it ends instead."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.alive:
                raise RuntimeError(self.log.read_text()[-4000:])
            try:
                if httpx.get(f"{self.url}/health/ready", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise TimeoutError(self.log.read_text()[-4000:])

    def has_drawn(self) -> bool:
        """Whether it has finished a picture since it was started."""
        try:
            metrics = httpx.get(f"{self.url}/metrics", timeout=30).text
        except httpx.TransportError:
            return False
        return any(
            line.startswith("slipstream_images_total{") and float(line.split()[-1]) for line in metrics.splitlines()
        )

    def kill(self) -> None:
        """SIGKILL: no word of farewell."""
        if self.process is None or self.process.pid is None:
            return
        if self.alive:
            os.kill(self.process.pid, signal.SIGKILL)
        if isinstance(self.process, subprocess.Popen):
            self.process.wait()
        else:
            self.process.join()
            self.process.close()
        self.process = None


def serve_forked(settings: dict[str, str], log: str) -> None:
    """What a forked server does."""
    from app.serve import serve
    from app.settings import Settings

    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(handle, 2)
    sys.exit(serve(Settings.model_validate_strings(settings)))


@contextmanager
def running(servers: Sequence[Server]) -> Iterator[None]:
    """Servers that take work, and are gone afterwards."""
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait()
        yield
    finally:
        for server in servers:
            server.kill()


def body(number: int, steps: int) -> dict[str, Any]:
    """Job `number`: prompts, sizes, seeds and accelerations differ."""
    asked: dict[str, Any] = {"prompt": PROMPTS[number % 4], "num_inference_steps": steps, "seed": 1000 + number}
    asked |= {"width": 32, "height": 48} if number % 5 == 0 else {}
    asked |= {"priority": "batch"} if number % 3 == 0 else {}
    return asked | ({"acceleration": {"mode": "deepcache", "interval": 2}} if number % 2 else {})


@dataclass
class Drill:
    """What happened."""

    jobs: int
    kills: int = 0
    ids: dict[int, str] = field(default_factory=dict)
    changed_ids: list[int] = field(default_factory=list)
    retries: int = 0
    submitted_seconds: float = 0.0
    seconds: float = 0.0
    lost: list[int] = field(default_factory=list)
    failed: dict[int, Any] = field(default_factory=dict)
    twice: int = 0
    compared: int = 0
    equal: int = 0
    largest_difference: int = 0

    def __str__(self) -> str:
        return (
            f"{self.jobs} jobs, {self.kills} kills, {self.retries} submissions repeated: {len(self.lost)} lost, "
            f"{len(self.failed)} failed, {self.twice} twice; {self.equal} of {self.compared} pictures equal to the "
            f"undisturbed run, the largest difference of a pixel {self.largest_difference} of 255; "
            f"submitted in {self.submitted_seconds:.0f} s, all done in {self.seconds:.0f} s"
        )


def drill(
    servers: Sequence[Server],
    jobs: int,
    kills: int,
    *,
    clients: int = 16,
    steps: int = 3,
    gap: float = 4.0,
    seed: int = 0,
) -> Drill:
    """Submit `jobs` jobs from many clients and kill one server after another, a random part of `gap` seconds apart.

    On a slow machine a kill waits until its server has finished a picture; otherwise no job would ever get anywhere.
    Servers must be running; the last one that was killed runs again at the end.
    """
    report, numbers, lock = Drill(jobs), iter(range(jobs)), threading.Lock()
    began, over = time.monotonic(), threading.Event()

    def client(which: int) -> None:
        with httpx.Client(timeout=10) as http:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                submit(http, number, which)

    def submit(http: httpx.Client, number: int, which: int) -> None:
        for attempt in range(10_000):
            server = servers[(which + attempt) % len(servers)]
            try:
                key = {"Idempotency-Key": f"drill-{number}"}
                answer = http.post(f"{server.url}{JOBS}", json=body(number, steps), headers=key)
            except httpx.TransportError:
                answer = None
            if answer is not None and answer.status_code == 202:
                found = answer.json()["id"]
                if report.ids.setdefault(number, found) != found:
                    report.changed_ids.append(number)
                if number % 7 or attempt % 2:  # every seventh client asks again, as one whose answer was lost
                    return
            elif answer is not None and answer.status_code not in (429, 503):
                raise RuntimeError(f"{answer.status_code}: {answer.text}")
            with lock:
                report.retries += 1
            time.sleep(0.5 if answer is None else 0)

    def killer() -> None:
        chance = random.Random(seed)
        while report.kills < kills and not over.is_set():
            over.wait(gap * chance.uniform(0.1, 1.0))
            server = servers[report.kills % len(servers)]
            while not (server.has_drawn() or over.is_set()):  # a job that sees three ends of its server is failed
                over.wait(0.2)
            server.kill()
            report.kills += 1
            server.start()
            server.wait()

    errors: list[BaseException] = []

    def guarded(work: Any, *arguments: Any) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            errors.append(error)
            over.set()

    killing = threading.Thread(target=guarded, args=(killer,))
    threads = [threading.Thread(target=guarded, args=(client, which)) for which in range(clients)]
    for thread in (killing, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    report.submitted_seconds = time.monotonic() - began
    killing.join()
    if errors:
        raise errors[0]
    account(servers[0], report)
    report.seconds = time.monotonic() - began
    return report


def account(server: Server, report: Drill, seconds: float = 3600.0) -> None:
    """Wait until every job is over, then hold all jobs that there are against those that were submitted."""
    deadline = time.monotonic() + seconds
    with httpx.Client(base_url=server.url, timeout=60) as http:
        while any(http.get(JOBS, params={"status": s, "limit": 1}).json()["data"] for s in ("queued", "in_progress")):
            if time.monotonic() > deadline:
                raise TimeoutError("the jobs do not end")
            time.sleep(0.2)
        found: list[dict[str, Any]] = []
        after: dict[str, str] = {}
        while True:
            page = http.get(JOBS, params={"limit": "100", **after}).json()
            found += page["data"]
            if not page["has_more"]:
                break
            after = {"after": page["last_id"]}
    by_id = {job["id"]: job for job in found}
    report.lost = [number for number, job_id in report.ids.items() if job_id not in by_id]
    report.lost += [number for number in range(report.jobs) if number not in report.ids]
    report.twice = len(found) - len({job["seed"] for job in found}) + len(report.changed_ids)
    states = {number: by_id[job_id] for number, job_id in report.ids.items() if job_id in by_id}
    report.failed = {
        number: job["error"]
        for number, job in states.items()
        if job["status"] != "completed" or job["seed"] != body(number, 1)["seed"]
    }


def compare(server: Server, undisturbed: Server, report: Drill, sample: int, steps: int = 3) -> None:
    """Hold a sample of the pictures against what a server makes that nobody kills."""
    numbers = random.Random(1).sample(sorted(report.ids), min(sample, len(report.ids)))
    with httpx.Client(timeout=60) as http:
        for number in numbers:
            stored = http.get(f"{server.url}{JOBS}/{report.ids[number]}/content")
            asked = {name: value for name, value in body(number, steps).items() if name != "priority"}
            live = http.post(f"{undisturbed.url}/generate", json=asked, headers={"Accept": "image/png"})
            difference = int(np.abs(pixels(stored.content) - pixels(live.content)).max())
            report.compared += 1
            report.equal += difference == 0
            report.largest_difference = max(report.largest_difference, difference)


def pixels(data: bytes) -> Any:
    """A picture as numbers [height, width, 3]."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int16)
