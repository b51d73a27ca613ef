"""`slipstream evaluate`: speed against fidelity of any set of accelerators."""

from __future__ import annotations

from typing import Annotated

import typer

from app.commands.options import (
    AdapterOption,
    DeviceOption,
    DtypeOption,
    FolderOption,
    ModelOption,
    PlanOption,
    ProfileOption,
    PromptsOption,
    SchedulerOption,
    StepsOption,
    loaded,
    parse_named,
    progress_bar,
    read_prompts,
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("evaluate")(evaluate)


def evaluate(
    model: ModelOption,
    output: FolderOption,
    acceleration: Annotated[
        list[str] | None,
        typer.Option(
            help="mode[:key=value[,key=value]...]; compose by +; repeat for further runs. Default: all that fit."
        ),
    ] = None,
    captions: Annotated[int, typer.Option(min=1, help="How many held-out captions of the shapes world.")] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures a caption.")] = 1,
    prompts: PromptsOption = None,
    steps: StepsOption = None,
    scheduler: SchedulerOption = None,
    adapter: AdapterOption = None,
    plan: PlanOption = None,
    profile: ProfileOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Measure speed against fidelity of any accelerations.

    MACs, wall time, likeness to the plain and the converged picture, alignment, Fréchet distance.
    Each acceleration stands beside plain runs of equal MACs, of the same solver and of the best one offered. Converged
    pictures (200 steps of DPM++ 2M where it is offered) are kept in the output folder for the next evaluation.
    """
    from app.commands.grammar import parse
    from models.quality import evaluate as measure
    from models.quality import report
    from models.shapes.judge import ShapesJudge

    adapters, plans = parse_named(adapter, "--adapter"), parse_named(plan, "--plan")
    profiles = parse_named(profile, "--profile")
    lines = read_prompts(prompts)
    accelerations = [parse(text) for text in acceleration or ()]
    backbone = loaded(model, device=device, dtype=dtype, adapters=adapters, plans=plans, profiles=profiles)
    with progress_bar("evaluate") as bar:
        task = bar.task_ids[0]
        evaluation = measure(
            backbone,
            accelerations,
            captions=lines or captions,
            judge=ShapesJudge(),
            seeds=seeds,
            num_inference_steps=steps,
            scheduler=scheduler,
            converged=output / "converged",
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    files = report.write(evaluation, output)
    typer.echo(report.table(evaluation))
    typer.echo("\n".join(str(file) for file in files))
