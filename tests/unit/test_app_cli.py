"""The console script: quick and readable help, and what a user got wrong is said in a line, before any work."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import models
from app.cli import app as cli
from app.cli import main
from app.commands.grammar import parse
from app.commands.options import composed
from models.accelerators import DeepCache, SelectiveGuidance
from tests.docs import walk

COMMANDS = dict(walk("slipstream", typer.main.get_command(cli)))
HEAVY = ("torch", "diffusers", "transformers", "matplotlib", "fastapi")
WITH_MODEL = {
    "generate": ["a ring"],
    "macs": [],
    "plan": ["--threshold", "0.1"],
    "calibrate": [],
    "evaluate": ["-o", "out"],
    "distill": ["-o", "out"],
    "warp": ["--images", "pictures"],
}
"""What the commands that take a model need beside it."""
FILES = {"generate": ".png", "plan": ".json", "calibrate": ".json"}
FOLDERS = ("evaluate", "distill", "jobs export")


def told(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the script says of a mistake: on standard error, in few lines, with exit code 2."""
    monkeypatch.setattr("sys.argv", ["slipstream", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code == 2, printed
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert len(printed.err.splitlines()) <= 8
    return " ".join(printed.err.split())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with a file for every mistake."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"no picture")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "list.json").write_text("[1]")
    return tmp_path


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded: the mistake is found before."""

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load", load)


def test_help_of_anything_imports_nothing_heavy(tmp_path: Path) -> None:
    lines = [["--help"], ["--version"], ["serve", "--help"], ["generate", "--help"], ["jobs", "list", "--help"]]
    lines += [["accelerators"], ["bench"], ["jobs", "list", "--data-dir", str(tmp_path)]]
    script = "import sys\nfrom app.cli import main\n"
    for line in lines:
        script += f"sys.argv = ['slipstream', *{line!r}]\ntry:\n    main()\nexcept SystemExit: pass\n"
        script += f"assert not [m for m in {HEAVY!r} if m in sys.modules], {line!r}\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "slipstream 0." in done.stdout
    assert done.stderr.splitlines() == [f"slipstream: {tmp_path}: there is no store"]


@pytest.mark.parametrize("name", ["slipstream", "slipstream jobs", *COMMANDS])
def test_help_is_readable_at_80_columns(name: str) -> None:
    result = CliRunner().invoke(cli, [*name.split()[1:], "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0
    assert "Usage:" in result.output
    assert max(map(len, result.output.splitlines())) <= 80


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("name", [name.partition(" ")[2] for name in COMMANDS if name != "slipstream bench"])
def test_an_unknown_option(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--nonsense" in told([*name.split(), "--nonsense", "1"], monkeypatch, capsys)


@pytest.mark.parametrize("command", [*WITH_MODEL, "models"])
def test_a_model_that_is_nowhere(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "warp":
        (folder / "pictures" / "a.png").write_bytes(PNG)
    option = "--memory" if command == "models" else "--model"
    arguments = [command, *WITH_MODEL.get(command, []), option, "/nowhere/at/all"]
    assert "/nowhere/at/all" in told(arguments, monkeypatch, capsys)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("command", FILES)
def test_a_place_that_cannot_be_written_is_said_before_the_work(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [command, *WITH_MODEL[command], "--model", "shapes-sd", "-o"]
    assert "make it first" in told([*arguments, f"/nowhere/file{FILES[command]}"], monkeypatch, capsys)
    (folder / f"folder{FILES[command]}").mkdir()
    assert "is a directory" in told([*arguments, f"folder{FILES[command]}"], monkeypatch, capsys)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_that_is_a_file(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if command.startswith("jobs") else ["--model", "shapes-sd"]
    assert "is a file" in told([*command.split(), *model, "-o", "bytes"], monkeypatch, capsys)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("generate ring --acceleration deepcache:interval=0", "interval"),
        ("generate ring --acceleration deepcache+warp9", "warp9"),
        ("macs --model shapes-sd --acceleration deepcache:depth=1", "deepcache takes interval"),
        ("evaluate --model shapes-sd -o out --acceleration deepcache:interval", "key=value"),
        ("generate ring -o ring.txt", "no picture"),
        ("generate ring --image pictures/a.png", "pictures/a.png"),
        ("generate ring --size 64", "WIDTHxHEIGHT"),
        ("generate ring --seed x", "--seed"),
        ("generate", "prompt"),
        ("calibrate --model shapes-sd --prompts bytes", "not UTF-8"),
        ("calibrate --model shapes-sd --prompts nowhere.txt", "nowhere.txt"),
        ("distill --model shapes-sd -o out --prompts empty.txt", "no prompts"),
        ("plan --threshold 0.1 --prompts empty.txt", "no prompts"),
        ("plan --threshold 0.1 --picture nowhere/D2.png", "make it first"),
        ("warp --images pictures", "a.png"),
        ("warp --images nowhere", "nowhere"),
        ("macs", "exactly one"),
        ("macs --unet-config bytes", "bytes"),
        ("macs --unet-config nowhere.json", "nowhere.json"),
        ("models --memory list.json", "not a diffusers config"),
        ("jobs show job-1 --data-dir nowhere", "no store"),
        ("jobs cancel job-1", "no store"),
        ("bench attack", "checkout"),
        ("serve --port 99999", "--port (SLIPSTREAM_PORT)"),
        ("serve --adapter shapes-sd", "MODEL=PATH"),
        ("fly", "fly"),
    ],
)
def test_a_mistake(
    line: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in told(line.split(), monkeypatch, capsys)


@pytest.mark.parametrize(
    ("option", "said"),
    [("--adapter=a=list.json", "list.json"), ("--plan=a=list.json", "list.json"), ("--profile=a=list.json", "a")],
)
def test_a_file_that_is_not_what_it_should_be(
    option: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in told(["generate", "ring", option], monkeypatch, capsys)


def test_a_taken_port_is_said_before_anything_is_imported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        script = "import sys\nfrom app.cli import main\n"
        script += f"sys.argv = ['slipstream', 'serve', '--port', '{port}']\ntry:\n    main()\n"
        script += "finally:\n    assert 'torch' not in sys.modules\n"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"slipstream: port {port} of 127.0.0.1 is taken")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("typed", "offered"), [("slipstream gen", "generate"), ("slipstream generate --steppi", "--stepping")]
)
def test_the_shell_completes(typed: str, offered: str) -> None:
    script = "import sys\nsys.argv = ['slipstream']\nfrom app.cli import main\nmain()\n"
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    environment = os.environ | words | {"_SLIPSTREAM_COMPLETE": "complete_bash"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [offered]


def test_acceleration_composes_by_plus_and_by_repeating() -> None:
    both = [DeepCache(interval=3), SelectiveGuidance(stop=0.5)]
    assert composed(["deepcache:interval=3+selective_guidance:stop=0.5"]) == both
    assert composed(["deepcache:interval=3", "selective_guidance:stop=0.5"]) == both
    assert parse("deepcache:interval=3+selective_guidance:stop=0.5") == both
    assert composed(None) == []


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001"
    "a5f645400000000049454e44ae426082"
)
"""A picture of one pixel."""
