"""`slipstream evaluate`: speed against fidelity of any set of accelerators."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.commands.options import (
    AdapterOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    OutputOption,
    PlanOption,
    ProfileOption,
    SchedulerOption,
    StepsOption,
    parse_named,
    progress_bar,
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("evaluate")(evaluate)


def evaluate(
    model: ModelOption,
    output: OutputOption,
    acceleration: Annotated[
        list[str] | None,
        typer.Option(
            help="mode[:key=value,...], joined by + to compose; each is a row of its own. Default: all that fit."
        ),
    ] = None,
    captions: Annotated[int, typer.Option(min=1, help="How many held-out captions of the shapes world.")] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures a caption.")] = 1,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts, one a line, in place of captions.")] = None,
    steps: StepsOption = None,
    scheduler: SchedulerOption = None,
    adapter: AdapterOption = None,
    plan: PlanOption = None,
    profile: ProfileOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Measure MACs, wall time, likeness to the plain and the converged picture, alignment and Fréchet distance.

    Each acceleration stands beside plain runs of equal MACs, of the same solver and of the best one offered. Converged
    pictures (200 steps of DPM++ 2M where it is offered) are kept in the output folder for the next evaluation.
    """
    from app.commands.grammar import parse
    from models import load
    from models.errors import SlipstreamError
    from models.quality import evaluate as measure
    from models.quality import report
    from models.shapes.judge import ShapesJudge

    adapters, plans = parse_named(adapter, "--adapter"), parse_named(plan, "--plan")
    lines = prompts.read_text().splitlines() if prompts is not None else []
    try:
        accelerations = [parse(text) for text in acceleration or ()]
        backbone = load(
            model,
            device=device,
            dtype=dtype,
            adapters=adapters,
            plans=plans,
            profiles=parse_named(profile, "--profile"),
        )
        with progress_bar("evaluate") as bar:
            task = bar.task_ids[0]
            evaluation = measure(
                backbone,
                accelerations,
                captions=[line.strip() for line in lines if line.strip()] or captions,
                judge=ShapesJudge(),
                seeds=seeds,
                num_inference_steps=steps,
                scheduler=scheduler,
                converged=output / "converged",
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except SlipstreamError as error:
        typer.echo(f"slipstream evaluate: {error}", err=True)
        raise typer.Exit(2) from error
    files = report.write(evaluation, output)
    typer.echo(report.table(evaluation))
    typer.echo("\n".join(str(file) for file in files))
