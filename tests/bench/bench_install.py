"""From nothing to a picture: the README's first command in a copy of the checkout. `slipstream bench install`"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.bench.harness import ROOT, Spread, clock
from tests.e2e.playground import free_port

HELP: tuple[list[str], ...] = ([], ["serve"], ["generate"], ["jobs", "list"])


def main() -> None:
    """The install and its first picture, the help of some commands, and the words of the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="Of each --help.")
    parser.add_argument("--quick", action="store_true", help="A smoke run: no install.")
    asked = parser.parse_args()
    readme = (ROOT / "README.md").read_text()
    lines = [f"README.md: {len(readme.split())} words"]
    lines += [] if asked.quick else install(readme)
    for words in HELP:
        wall, processor = help_of(words, 1 if asked.quick else asked.rounds)
        lines.append(f"slipstream {' '.join([*words, '--help'])}: {wall} s, {processor} s of a processor")
    print(text := "\n".join(lines))
    target = ROOT / "runs" / "bench" / "install.txt"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + "\n")


def blocks(readme: str) -> list[str]:
    """The bash blocks of a page."""
    return [part.partition("```")[0] for part in readme.split("```bash\n")[1:]]


def install(readme: str) -> list[str]:
    """Seconds from the README's first command to the script, to health and to the picture of its first curl."""
    command = blocks(readme)[0]
    curl = next(block for block in blocks(readme) if block.startswith("curl"))
    with tempfile.TemporaryDirectory(prefix="slipstream-install-") as folder:
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        port = free_port()
        began, script = clock(), Path(folder) / ".venv" / "bin" / "slipstream"
        environment = os.environ | {"SLIPSTREAM_PORT": str(port)}
        process = subprocess.Popen(["bash", "-c", command], cwd=folder, env=environment, start_new_session=True)
        try:
            installed = _until(script.exists, process) - began
            ready = _until(lambda: _healthy(port), process) - began
            subprocess.run(["bash", "-ec", curl.replace(":8000", f":{port}")], cwd=folder, check=True)
            picture = clock() - began
            assert (Path(folder) / "ring.png").stat().st_size > 100
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    return [f"installed after {installed:.1f} s, ready after {ready:.1f} s, first picture after {picture:.1f} s"]


def _until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> float:
    while not condition():
        if process.poll() is not None:
            raise RuntimeError(f"the command ended with {process.returncode}")
        time.sleep(0.1)
    return clock()


def _healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200
    except httpx.TransportError:
        return False


def help_of(words: list[str], rounds: int) -> tuple[Spread, Spread]:
    """Wall and processor seconds of a command's --help."""
    wall, processor = [], []
    for _ in range(rounds):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), clock()
        subprocess.run([sys.executable, "-m", "app.cli", *words, "--help"], cwd=ROOT, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall.append(clock() - began)
        processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return Spread.of(wall), Spread.of(processor)


if __name__ == "__main__":
    main()
