"""`slipstream bench`: the benchmarks of the checkout one is in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

FOLDER = Path("tests") / "bench"


def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which; without it, those that there are.")] = None,
    quick: Annotated[bool, typer.Option(help="A smoke run: tiny sizes, figures that mean nothing.")] = False,
) -> None:
    """Run one benchmark; what follows its name goes to it (try --help). Results go to runs/bench."""
    if name == "--help":
        typer.echo(context.get_help())
        return
    root = checkout(Path.cwd())
    if root is None:
        raise typer.BadParameter(f"no {FOLDER} here or above: benchmarks run in a checkout of the repository")
    known = sorted(file.stem.removeprefix("bench_") for file in (root / FOLDER).glob("bench_*.py"))
    if name is None:
        typer.echo("\n".join(known))
        return
    if name not in known:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint="NAME")
    command = [sys.executable, "-m", f"tests.bench.bench_{name}", *(["--quick"] if quick else []), *context.args]
    raise typer.Exit(subprocess.run(command, cwd=root, env=os.environ, check=False).returncode)  # noqa: S603


def checkout(start: Path) -> Path | None:
    """The folder at or above `start` that holds the benchmarks."""
    return next((folder for folder in (start, *start.parents) if (folder / FOLDER / "harness.py").is_file()), None)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(
        bench
    )
