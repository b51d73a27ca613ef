"""`slipstream evaluate`: speed against fidelity of any set of accelerators."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("evaluate")(evaluate)


def evaluate(
    model: Annotated[str, typer.Option(help="Bundled name, directory in diffusers' layout, or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the JSON, table and pictures.")],
    acceleration: Annotated[
        list[str] | None,
        typer.Option(
            help="mode[:key=value,...], joined by + to compose; each is a row of its own. Default: all that fit."
        ),
    ] = None,
    captions: Annotated[int, typer.Option(min=1, help="How many held-out captions of the shapes world.")] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures a caption.")] = 1,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts, one a line, in place of captions.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; default the model's.")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=PATH of a further student.")] = None,
    plan: Annotated[list[str] | None, typer.Option(help="NAME=PATH of a further DiTFastAttn plan.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Measure rows, MACs, wall time, likeness, alignment and Fréchet distance, each beside its controls."""
    from rich.progress import Progress

    from app.commands.grammar import parse
    from models import load
    from models.errors import SlipstreamError
    from models.quality import evaluate as measure
    from models.quality import report

    lines = prompts.read_text().splitlines() if prompts is not None else []
    try:
        accelerations = [parse(text) for text in acceleration or ()]
        backbone = load(model, device=device, dtype=dtype, adapters=_paths(adapter), plans=_paths(plan))
        with Progress() as bar:
            task = bar.add_task("evaluate", total=None)
            evaluation = measure(
                backbone,
                accelerations,
                captions=[line.strip() for line in lines if line.strip()] or captions,
                seeds=seeds,
                num_inference_steps=steps,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except SlipstreamError as error:
        typer.echo(f"slipstream evaluate: {error}", err=True)
        raise typer.Exit(2) from error
    files = report.write(evaluation, output)
    typer.echo(report.table(evaluation))
    typer.echo("\n".join(str(file) for file in files))


def _paths(pairs: list[str] | None) -> dict[str, str | Path]:
    named: dict[str, str | Path] = {}
    for pair in pairs or ():
        name, equals, path = pair.partition("=")
        if not equals or not name or not path:
            raise typer.BadParameter(f"{pair!r} is not NAME=PATH")
        named[name] = path
    return named
