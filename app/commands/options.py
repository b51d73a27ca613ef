"""Options and helpers that several commands share: one definition each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ModelOption = Annotated[str, typer.Option("--model", help="A bundled name, a directory, or a hub id.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
SteppingOption = Annotated[
    Literal["auto", "exact", "batched"], typer.Option("--stepping", help="Schedulers' own steps, or tables of them.")
]
StepsOption = Annotated[int | None, typer.Option("--steps", help="Denoising steps; default the model's.")]
ScaleOption = Annotated[float | None, typer.Option("--guidance-scale", help="Guidance scale; default the model's.")]
SchedulerOption = Annotated[str | None, typer.Option("--scheduler", help="Noise scheduler; default the model's.")]
SizeOption = Annotated[str | None, typer.Option("--size", help="WIDTHxHEIGHT in pixels; default the model's.")]
AccelerationOption = Annotated[
    list[str] | None,
    typer.Option("--acceleration", help="mode[:key=value[,key=value]...]; repeat to compose."),
]
AdapterOption = Annotated[
    list[str] | None, typer.Option("--adapter", help="NAME=PATH of a LoRA student to register with the model.")
]
PlanOption = Annotated[list[str] | None, typer.Option("--plan", help="NAME=PATH of a DiTFastAttn plan to register.")]
ProfileOption = Annotated[
    list[str] | None, typer.Option("--profile", help="NAME=PATH of a measured profile to register, for auto.")
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="For a .safetensors file: a diffusers directory with the configs of its family."),
]
OutputOption = Annotated[Path, typer.Option("-o", "--output")]

console = Console(stderr=True)


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """`64x48` to (64, 48)."""
    if text is None:
        return None, None
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise typer.BadParameter(f"{text!r} is not WIDTHxHEIGHT, such as 64x64", param_hint="--size")
    return int(width), int(height)


def parse_named(items: list[str] | None, option: str) -> dict[str, str]:
    """`NAME=PATH` items to a dict."""
    named = {}
    for item in items or ():
        name, separator, path = item.partition("=")
        if not (name and separator and path):
            raise typer.BadParameter(f"{item!r} is not NAME=PATH", param_hint=option)
        named[name] = path
    return named


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """A bar with count, time gone and time left on standard error."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        progress.add_task(label, total=None, note="")
        yield progress
