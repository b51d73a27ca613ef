"""Runs tests on a copy of the checkout in forks of a process that has imported the heavy libraries already.

The parent imports nothing of ours, computes nothing and starts no thread, so that a fork is as good as a fresh process.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OURS = {"app", "models", "tests"}
HEAVY = """
torch numpy PIL.Image skimage.metrics matplotlib.figure peft safetensors.torch pytest hypothesis schemathesis openai
diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion diffusers.schedulers.scheduling_unipc_multistep
diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl diffusers.pipelines.dit.pipeline_dit
diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma transformers.models.clip.modeling_clip
httpx transformers.models.t5.modeling_t5 transformers.models.auto.tokenization_auto fastapi.testclient uvicorn
sse_starlette pydantic_settings prometheus_client typer.testing rich.console
"""
SITE = "import coverage\n\ncoverage.process_startup()\n"
COVERAGE = """[run]
source = {tree}/app
    {tree}/models
data_file = {data}
parallel = true
sigterm = true
disable_warnings = module-not-imported, no-data-collected, module-not-measured, no-ctracer
"""


def import_heavy() -> None:
    """Import what every test process needs; what is not installed is left out."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    for name in HEAVY.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if threading.active_count() > 1:
        raise RuntimeError(f"an import started a thread, which no fork survives: {threading.enumerate()}")


def copy_checkout(root: Path) -> Path:
    """A folder with the files of the checkout that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=root, check=True, capture_output=True
    )
    tree = Path(tempfile.mkdtemp(prefix="mutants-")) / "tree"
    for name in listed.stdout.decode().split("\0"):
        if (root / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, tree / name)
    return tree


@dataclass(frozen=True)
class Tests:
    """Test files and, where only some of their tests are wanted, the place of each."""

    files: Sequence[str]
    order: Mapping[str, int] = field(default_factory=dict)

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Hook of pytest: keep and sort."""
        if self.order:
            kept = sorted((i for i in items if i.nodeid in self.order), key=lambda item: self.order[item.nodeid])
            config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in self.order])
            items[:] = kept


class Fork:
    """A fork that runs tests in a tree; what they print goes to a log."""

    def __init__(self, tree: Path, tests: Tests, options: Sequence[str], limit: float, *plugins: object) -> None:
        self.tree, self.log = tree, tree.parent / "log"
        self._ends = time.monotonic() + limit
        self.pid = os.fork()
        if not self.pid:
            arguments = [
                *tests.files,
                "-q",
                "-n0",
                "-p",
                "no:cacheprovider",
                f"--basetemp={tree.parent / 'tmp'}",
                *options,
            ]
            # Plugins of pytest are among what is imported already: their assertions are not rewritten, and no matter.
            arguments += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
            _in_child(lambda: _pytest(tree, arguments, [tests, *plugins]), self.log)

    def __enter__(self) -> Fork:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    def _kill(self) -> None:
        """With the servers that tests left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def ended(self) -> int | str | None:
        """pytest's exit code, "hung" where it had to be ended, None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() < self._ends:
            return None
        self._kill()
        os.waitpid(self.pid, 0)
        return "hung"

    def wait(self) -> int | str:
        """`ended`, once it has."""
        while (code := self.ended()) is None:
            time.sleep(0.05)
        return code


def _in_child(work: Callable[[], int], log: Path) -> None:
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(file, stream)
        code = work()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _pytest(tree: Path, arguments: list[str], plugins: list[object]) -> int:
    import pytest

    os.chdir(tree)
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(place for place in sys.path if Path(place).resolve() != ROOT)]
    paths = (str(tree), os.environ.get("MUTANTS_SITE"), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    importlib.invalidate_caches()
    return int(pytest.main(arguments, plugins=plugins))


class Timing:
    """A plugin of pytest that notes how long each test took, and which failed, in the fork; `write` sends it home."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seconds: dict[str, float] = {}
        self._failed: set[str] = set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Hook of pytest."""
        self._seconds[report.nodeid] = self._seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self._failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Hook of pytest."""
        self._file.write_text(json.dumps({"seconds": self._seconds, "failed": sorted(self._failed)}))
