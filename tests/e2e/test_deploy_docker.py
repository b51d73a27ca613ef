"""The Dockerfile's own commands in a clean directory: all but downloading the dependencies and adding the user."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deploy import ROOT, free_port, process, stages, until

pytestmark = pytest.mark.slow


class Build:
    """A directory that plays the file system of every stage."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stages = stages()

    def path(self, text: str) -> str:
        """A command or setting with the image's absolute paths moved under the root."""
        for top in ("/opt/", "/dist", "/cache", "/tmp/matplotlib"):
            text = text.replace(top, f"{self.root}{top}")
        return text

    def copy(self, stage: str) -> Path:
        """The working directory of a stage with what it copies, less what .dockerignore leaves out."""
        folder = self.root / stage
        folder.mkdir()
        ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("**/")]
        skip = shutil.ignore_patterns(*(pattern.removeprefix("**/") for pattern in ignored))
        for name, rest in self.stages[stage]:
            if name == "COPY":
                for source in rest.split()[:-1]:
                    if (ROOT / source).is_dir():
                        shutil.copytree(ROOT / source, folder / source, ignore=skip)
                    else:
                        shutil.copy(ROOT / source, folder)
        return folder

    def run(self, stage: str, words: str, cwd: Path) -> None:
        """The RUN of a stage that has these words."""
        (command,) = [rest for name, rest in self.stages[stage] if name == "RUN" and words in rest]
        while command.startswith("--mount"):
            command = command.partition(" ")[2].lstrip()
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        # The dependencies are borrowed from this environment, which may have the project itself installed too.
        environment = {**os.environ, "PATH": path, "EXTRAS": "", "PIP_IGNORE_INSTALLED": "1"}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.path(command)],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
        )
        if "No matching distribution" in done.stderr:
            pytest.skip("needs a package index")
        assert done.returncode == 0, done.stdout + done.stderr

    def environment(self) -> dict[str, str]:
        """The ENV of the image."""
        (line,) = [rest for name, rest in self.stages["server"] if name == "ENV"]
        pairs = dict(word.split("=", 1) for word in shlex.split(line))
        return {name: self.path(value).replace("$PATH", os.environ["PATH"]) for name, value in pairs.items()}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Every stage built; in place of the downloaded dependencies, those of this environment."""
    build = Build(tmp_path_factory.mktemp("image"))
    (build.root / "opt").mkdir()
    (build.root / "cache").mkdir()
    dependencies = build.copy("dependencies")
    build.run("dependencies", "-m venv", dependencies)
    site = next((build.root / "opt/slipstream/lib").iterdir()) / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    wheel = build.copy("wheel")
    build.run("wheel", "setuptools", wheel)
    build.run("wheel", "pip wheel", wheel)
    build.run("server", "/dist/*.whl", build.root)
    return build


def test_dependencies_are_those_of_the_project(image: Build) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (image.root / "dependencies/requirements.txt").read_text().splitlines() == project["dependencies"]


def test_wheel_has_the_bundled_models_and_the_playground_and_no_tests(image: Build) -> None:
    (built,) = (image.root / "dist").glob("*.whl")
    packed = set(zipfile.ZipFile(built).namelist())
    assert {str(path.relative_to(ROOT)) for path in files(ROOT / "models/bundled")} <= packed
    assert {"app/cli.py", "app/web/index.html", "models/denoise.py"} <= packed
    assert not any(name.startswith("tests/") for name in packed)


def test_server_starts_is_healthy_writes_nowhere_else_and_stops(
    image: Build, pipeline_dir: Callable[[str], Path]
) -> None:
    server = dict(image.stages["server"])
    settings = {"PORT": str(free_port()), "MODEL": str(pipeline_dir("sd")), "MAX_ROWS": "4", "DEVICE": "cpu"}
    environment = image.environment() | {f"SLIPSTREAM_{name}": value for name, value in settings.items()}
    command = json.loads(server["ENTRYPOINT"]) + json.loads(server["CMD"])
    check = json.loads(server["HEALTHCHECK"].partition("CMD ")[2])
    for words in (command, check):
        words[0] = str(image.root / "opt/slipstream/bin" / words[0])

    def healthy() -> bool:
        return subprocess.run(check, env=os.environ | environment, capture_output=True).returncode == 0

    before = files(image.root)
    assert not healthy()
    log = image.root / "cache/log"
    with process(command, log, **environment) as child:
        until(healthy, 150, "the health check")
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 0, log.read_text()
    assert "Traceback" not in log.read_text()
    assert {path.relative_to(image.root).parts[0] for path in files(image.root) - before} <= {"cache", "tmp"}


def files(root: Path) -> set[Path]:
    """Every file below, caches of compiled Python aside."""
    return {path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
