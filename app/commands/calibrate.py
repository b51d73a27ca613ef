"""`slipstream calibrate`: measures the front of speed against fidelity as a profile, with a picture, resumable."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from app.commands.options import (
    AdapterOption,
    DeviceOption,
    DtypeOption,
    FileOption,
    ModelOption,
    PromptsOption,
    SchedulerOption,
    SizeOption,
    StepsOption,
    console,
    loaded,
    parse_named,
    parse_size,
    progress_bar,
    read_prompts,
    writable,
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("calibrate")(calibrate)


def calibrate(
    model: ModelOption,
    output: FileOption = Path("profile.json"),
    scheduler: SchedulerOption = None,
    steps: StepsOption = None,
    size: SizeOption = None,
    prompts: PromptsOption = None,
    count: Annotated[
        int, typer.Option(min=4, max=4096, help="How many pictures: a quarter fits, one chooses, half check.")
    ] = 64,
    reference_steps: Annotated[int, typer.Option(min=2, max=1000, help="Steps of the converged pictures.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Picture i is drawn from seed + i.")] = 0,
    picture: Annotated[
        Path | None, typer.Option(callback=writable, help="The front as a PNG; default beside the profile.")
    ] = None,
    adapter: AdapterOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Measure the front of speed against fidelity as a profile. Stopped, it goes on from where it was.

    Every way to draw a picture is measured, and which steps to compute is searched.
    """
    from models import calibrate as measure
    from models.profiles.picture import draw
    from models.shapes.judge import ShapesJudge

    width, height = parse_size(size)
    lines = read_prompts(prompts)
    backbone = loaded(model, device=device, dtype=dtype, adapters=parse_named(adapter, "--adapter"))
    checkpoint = output.with_suffix(".calibration")
    resumed, began = checkpoint.is_dir(), time.monotonic()
    with progress_bar("calibrating") as bar:
        profile = measure(
            backbone,
            _prompts(lines, backbone.spec.prompt_grammar, backbone.spec.examples, count, seed),
            scheduler=scheduler,
            num_inference_steps=steps,
            width=width,
            height=height,
            seed=seed,
            reference_steps=reference_steps,
            judge=ShapesJudge(),
            checkpoint=checkpoint,
            progress=lambda done, total, note: bar.update(
                bar.task_ids[0], completed=done, total=total or None, note=note
            ),
        )
    profile.save(output)
    draw(profile, picture or output.with_suffix(".png"))
    shutil.rmtree(checkpoint)
    seconds = f"in {time.monotonic() - began:.0f} s" + (" since it was taken up again" if resumed else "")
    counts = f"{len(profile.candidates)} candidates, {len(profile.schedules)} schedules"
    console.print(f"[bold]{output}[/bold]  {counts}, {seconds}")


def _prompts(
    lines: list[str], grammar: Mapping[str, Any] | None, examples: Sequence[str], count: int, seed: int
) -> list[str]:
    """`count` prompts: of a file, or drawn from what the model says that it understands, or its examples."""
    if not lines and grammar is not None:
        draw = random.Random(seed)
        return [_sentence(grammar, draw) for _ in range(count)]
    texts = lines or list(examples)
    if not texts:
        raise typer.BadParameter("the model has no examples; give a file of prompts", param_hint="--prompts")
    return [texts[i % len(texts)] for i in range(count)]


def _sentence(grammar: Mapping[str, Any], draw: random.Random) -> str:
    """One sentence of a grammar of templates; what a template names twice is drawn without repetition."""
    template = str(draw.choice(grammar["templates"]))
    words = {key.removesuffix("s"): value for key, value in grammar.items() if key != "templates"}
    for name, choices in words.items():
        times = template.count(f"{{{name}}}")
        for word in draw.sample(choices, times) if times <= len(choices) else draw.choices(choices, k=times):
            template = template.replace(f"{{{name}}}", word, 1)
    return template
