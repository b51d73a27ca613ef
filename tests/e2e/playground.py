"""What the playground's tests and its screenshot share: Chromium, a served model, and the page's own vocabulary."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, Playwright

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
READY_WITHIN = 240.0  # seconds


def chromium() -> str | None:
    """The path of an installed Chromium, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, names) if path), None)


def launch(playwright: Playwright) -> Browser:
    """Chromium without a window, and without a word to anybody but the server."""
    return playwright.chromium.launch(executable_path=chromium(), args=list(ARGUMENTS))


def start_server(models: Sequence[str], port: int, **environment: str) -> subprocess.Popen[bytes]:
    """`slipstream serve` as a process of its own, told what it would else measure: room for many rows, one thread.

    Small networks gain nothing from threads, which wait for each other where the machine has other things to do.
    """
    told = {"SLIPSTREAM_MAX_ROWS": "16", "SLIPSTREAM_TORCH_THREADS": "1"}
    named = [argument for model in models for argument in ("--model", model)]
    command = [sys.executable, "-m", "app.cli", "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    return subprocess.Popen(command + named, env=os.environ | told | environment)


@contextmanager
def stopped_at_the_end(server: subprocess.Popen[bytes]) -> Iterator[None]:
    """Give a server its SIGTERM, whatever happens meanwhile."""
    try:
        yield
    finally:
        server.terminate()
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    """Return once the server takes requests; RuntimeError when it ends before, TimeoutError when it takes too long."""
    until = time.monotonic() + READY_WITHIN
    while time.monotonic() < until:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/health/ready", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise TimeoutError(f"{url} was not ready within {READY_WITHIN:g} s")


def with_words(pipeline: Path, target: Path) -> Path:
    """A copy of a pipeline that also has what the bundled models say of themselves: examples, grammar, defaults."""
    shutil.copytree(pipeline, target)
    facts = {
        "description": "random weights",
        "default_num_inference_steps": 8,
        "default_guidance_scale": 4.0,
        "examples": ["a large red circle on a white background", "a small blue star on a black background"],
        "prompt_grammar": {
            "templates": ["a {size} {colour} {shape} on a {colour} background"],
            "sizes": ["large", "small"],
            "colours": ["red", "green", "blue", "white"],
            "shapes": ["circle", "star"],
        },
    }
    (target / "slipstream.json").write_text(json.dumps(facts))
    return target


def open_playground(page: Page, url: str, **settings: Any) -> None:
    """Open the page with some of its state in the link, and wait until it knows the server's models."""
    pairs = [(name, value) for name, values in settings.items() for value in _listed(values)]
    page.goto(f"{url}/#{'&'.join(f'{name}={value}' for name, value in pairs)}")
    page.wait_for_selector(".lane")


def run(page: Page, timeout: float = 60_000) -> None:
    """Press the button and wait for the end."""
    page.click("#run")
    page.wait_for_selector("#run", state="visible", timeout=timeout)


def serious_violations(page: Page) -> list[str]:
    """What axe-core finds that is serious or critical, one line each."""
    page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{violation['id']}: {node['target']} {node.get('failureSummary', '')}"
        for violation in found["violations"]
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


def _listed(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [values]
