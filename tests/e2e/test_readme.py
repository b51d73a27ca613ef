"""Every block of code in the README runs, in its order, in one folder: what it serves is asked for health.

A comment above a block says what is done differently here: `<!-- skip: REASON -->` leaves it out, `<!-- last: … -->`
runs the last of its commands alone, `<!-- with: COMMAND OPTIONS -->` makes a command of the block smaller.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.cli import main
from tests.e2e.playground import free_port, wait_until_ready
from tests.single_file import save_single_file
from tests.styles import save_style

README = (Path(__file__).parents[2] / "README.md").read_text()
FENCE = re.compile(r"((?:<!--[^>]*-->\n)*)```(\w+)\n(.*?)```", re.DOTALL)
MARK = re.compile(r"<!-- (\w+): (.*?) -->")
QUICK = {"SLIPSTREAM_TORCH_THREADS": "1", "SLIPSTREAM_MAX_ROWS": "8"}


@dataclass(frozen=True)
class Block:
    """A block of code and what its comments say."""

    language: str
    code: str
    marks: tuple[tuple[str, str], ...]

    def said(self, name: str) -> list[str]:
        """What the comments of one name say."""
        return [text for mark, text in self.marks if mark == name]

    def commands(self) -> list[list[str]]:
        """The commands of a bash block, as words."""
        if self.said("last"):
            return [shlex.split(self.code.rpartition(" && ")[2])]
        found, open_line = [], ""
        for line in self.code.splitlines(keepends=True):
            open_line += line
            if open_line.count("'") % 2 == 0 and not open_line.endswith("\\\n"):
                found.append(shlex.split(open_line.replace("\\\n", " "), comments=True))
                open_line = ""
        return found


BLOCKS = [Block(language, code, tuple(MARK.findall(marks))) for marks, language, code in FENCE.findall(README)]


@dataclass
class Place:
    """The folder where all happens, and the server that runs there."""

    folder: Path
    port: int = field(default_factory=free_port)
    server: subprocess.Popen[bytes] | None = None

    def serve(self, words: list[str]) -> None:
        """Start a server in place of the last, and wait for its health."""
        self.stop()
        self.port = free_port()
        environment = os.environ | QUICK | {"SLIPSTREAM_PORT": str(self.port)}
        self.server = subprocess.Popen([sys.executable, "-m", "app.cli", *words[1:]], cwd=self.folder, env=environment)
        wait_until_ready(f"http://127.0.0.1:{self.port}", self.server)

    def stop(self) -> None:
        """End the server, which drains."""
        if self.server is not None:
            self.server.terminate()
            assert self.server.wait(60) == 0
            self.server = None

    def here(self, text: str) -> str:
        """A text with this server's address for the README's."""
        return text.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, pipeline_dir: Callable[[str], Path], pipeline_of: Callable[..., Any]
) -> Iterator[Place]:
    """A user's folder: a model in diffusers' layout, another in one file, a LoRA, some prompts."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(pipeline_dir("sd"), folder / "my-model")
    save_single_file(pipeline_of("sd"), folder / "other.safetensors")
    save_style(pipeline_of("sd"), folder / "watercolour.safetensors", 1)
    (folder / "prompts.txt").write_text("a red ring\na blue star\n")
    place = Place(folder)
    yield place
    place.stop()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("block", BLOCKS, ids=[f"{i}-{block.language}" for i, block in enumerate(BLOCKS)])
def test_a_block(
    block: Block, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for reason in block.said("skip"):
        pytest.skip(reason)
    monkeypatch.chdir(place.folder)
    if block.language == "python":
        exec(compile(place.here(block.code), "README.md", "exec"), {})
        return
    assert block.language == "bash"
    smaller = {text.split()[0]: text.split()[1:] for text in block.said("with")}
    for words in block.commands():
        if "serve" in words[:2] and Path(words[0]).name == "slipstream":
            place.serve(words)
        elif words[0] == "slipstream" and words[1] != "generate":
            monkeypatch.setattr("sys.argv", words + smaller.get(words[1], []))
            with pytest.raises(SystemExit) as ended:
                main()
            assert not ended.value.code, (words, capsys.readouterr().err)
        else:
            command = [sys.executable, "-m", "app.cli", *words[1:]] if words[0] == "slipstream" else words
            done = subprocess.run([place.here(word) for word in command], capture_output=True, text=True, check=False)
            assert (done.returncode, done.stdout) == (0, ""), done.stderr
            assert len(done.stderr.splitlines()) <= 6, done.stderr  # nobody else's words, no bar in a pipe


@pytest.mark.slow
def test_what_the_blocks_leave_behind(place: Place) -> None:
    left = {path.name for path in place.folder.iterdir()}
    assert {"ring.png", "star.png", "styled.png", "profile.json", "profile.png", "student", "D2.json", "D2.png"} <= left
    for name in ("ring.png", "star.png"):
        with Image.open(place.folder / name) as picture:
            assert picture.size == (64, 64)


def test_every_block_is_run_or_says_why_not() -> None:
    assert README.count("\n```") == 2 * len(BLOCKS)
    assert {block.language for block in BLOCKS} <= {"bash", "python"}
    skipped = [reason for block in BLOCKS for reason in block.said("skip")]
    assert all(reason.startswith("needs ") or reason == "the test suite itself" for reason in skipped)
    assert len(BLOCKS) - len(skipped) >= 9
