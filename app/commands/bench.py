"""`slipstream bench`: the benchmarks of the checkout one is in."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

FOLDER = Path("tests") / "bench"
NEEDS = "benchmarks run in a checkout of the repository with: pip install '.[test,bench]'"


def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which; without it, those that there are.")] = None,
    quick: Annotated[bool, typer.Option(help="A smoke run: tiny sizes, figures that mean nothing.")] = False,
) -> None:
    """Run one benchmark of a checkout. What follows its name goes to it (try --help).

    Needs a checkout of the repository and: pip install ".[test,bench]". Results go to runs/bench.
    """
    if name == "--help":
        typer.echo(context.get_help())
        return
    root = checkout(Path.cwd())
    if root is None:
        raise typer.BadParameter(f"no {FOLDER} here or above: {NEEDS}")
    known = sorted(file.stem.removeprefix("bench_") for file in (root / FOLDER).glob("bench_*.py"))
    if name is None:
        for one in known:
            file = root / FOLDER / f"bench_{one}.py"
            lacking = ", ".join(missing(root, file))
            about = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0].partition(". `")[0]
            typer.echo(f"{one:14} {about}" + (f" [needs {lacking}]" if lacking else ""))
        return
    if name not in known:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint="NAME")
    if lacking := ", ".join(missing(root, root / FOLDER / f"bench_{name}.py")):
        raise typer.BadParameter(f"{name} needs {lacking}: {NEEDS}", param_hint="NAME")
    command = [sys.executable, "-m", f"tests.bench.bench_{name}", *(["--quick"] if quick else []), *context.args]
    raise typer.Exit(subprocess.run(command, cwd=root, env=os.environ, check=False).returncode)  # noqa: S603


def checkout(start: Path) -> Path | None:
    """The folder at or above `start` that holds the benchmarks."""
    return next((folder for folder in (start, *start.parents) if (folder / FOLDER / "harness.py").is_file()), None)


def missing(root: Path, file: Path) -> list[str]:
    """The packages that a benchmark imports, itself or through other tests, and that are not installed."""
    seen, todo, names = {file}, [file], set[str]()
    while todo:
        for module in _imported(todo.pop()):
            here = [root / f"{module.replace('.', '/')}.py"] if module.startswith("tests.") else []
            todo += [one for one in here if one.is_file() and one not in seen]
            seen.update(here)
            names.add(module.partition(".")[0])
    return sorted(name for name in names - {"tests"} if name not in sys.stdlib_module_names and not find_spec(name))


def _imported(file: Path) -> Iterator[str]:
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(
        bench
    )
