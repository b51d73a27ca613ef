"""What the deployment tests share: where the files are, Dockerfile steps, PromQL names, and waiting for a process."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import yaml

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"


def documents(path: Path) -> list[Any]:
    """Every document of a YAML file."""
    return list(yaml.safe_load_all(path.read_text()))


def dockerfile() -> list[tuple[str, str]]:
    """The Dockerfile's (instruction, arguments), comments dropped and continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines) if name]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The Dockerfile's instructions by stage."""
    out: dict[str, list[tuple[str, str]]] = {}
    for name, rest in dockerfile():
        if name == "FROM":
            out[rest.split()[-1]] = []
        elif out:
            out[next(reversed(out))].append((name, rest))
    return out


def dashboard_queries() -> dict[str, str]:
    """Every query of every panel, by panel title and letter."""
    board = json.loads((DEPLOY / "grafana/dashboards/slipstream.json").read_text())
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in board["panels"]
        for target in panel.get("targets", [])
    }


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def get(url: str, **query: str) -> str:
    """The text of a 2xx answer."""
    return httpx.get(url, params=query, timeout=10).raise_for_status().text


def post(base: str, **body: Any) -> httpx.Response:
    """One generation, whatever its status; a stream is read to its end."""
    return httpx.post(f"{base}/generate", json=body, timeout=200)


def until(probe: Callable[[], T], seconds: float, what: str) -> T:
    """The first true answer of `probe`; an error counts as not yet."""
    end = time.monotonic() + seconds
    last: object = None
    while time.monotonic() < end:
        try:
            if answer := probe():
                return answer
            last = answer
        except (httpx.HTTPError, KeyError, ValueError) as error:
            last = error
        time.sleep(0.2)
    raise TimeoutError(f"{what}: not within {seconds:.0f} s, last {last!r}")


@contextmanager
def process(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A child process for the length of a block; its output goes to `log`, which is shown if it has to be killed."""
    with log.open("wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            sys.stderr.write(log.read_text())
