"""Options and helpers that several commands share: one definition each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from PIL import Image

    from models import Backbone
    from models.accelerators import Accelerator


def writable(path: Path | None) -> Path | None:
    """A file that can be written, said before the work and not after it."""
    if path is not None:
        if path.is_dir():
            raise typer.BadParameter(f"{path} is a directory, not a file")
        if not path.parent.is_dir():
            raise typer.BadParameter(f"{path.parent} is no directory: make it first")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise typer.BadParameter(f"{path} cannot be written")
    return path


def _folder(path: Path) -> Path:
    """A folder that there is or that can be made, said before the work."""
    above = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not above.is_dir():
        raise typer.BadParameter(f"{above} is a file, not a directory")
    if not os.access(above, os.W_OK):
        raise typer.BadParameter(f"{above} cannot be written")
    return path


def _picture(path: Path) -> Path:
    """A file that can be written, in a format that Pillow knows by its ending."""
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise typer.BadParameter(f"{path} is no picture by its ending, such as .png")
    return writable(path) or path


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
    typer.Option("--acceleration", help="mode[:key=value[,key=value]...]; compose by + or by repeating."),
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="NAME=PATH of a LoRA, student or style, to register with the model."),
]
ControlOption = Annotated[
    list[str] | None, typer.Option("--control", help="NAME=PATH of a control network to register with the model.")
]
PlanOption = Annotated[list[str] | None, typer.Option("--plan", help="NAME=PATH of a DiTFastAttn plan to register.")]
ProfileOption = Annotated[
    list[str] | None, typer.Option("--profile", help="NAME=PATH of a measured profile to register, for auto.")
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="For a .safetensors file: a diffusers directory with the configs of its family."),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        "--prompts", exists=True, dir_okay=False, help="A text file, a prompt a line; default the model's own."
    ),
]
FileOption = Annotated[Path, typer.Option("-o", "--output", callback=writable, help="The file to write.")]
FolderOption = Annotated[Path, typer.Option("-o", "--output", callback=_folder, help="The folder to write into.")]
PictureOption = Annotated[Path, typer.Option("-o", "--output", callback=_picture, help="The picture to write.")]
PlotOption = Annotated[Path | None, typer.Option("--picture", callback=writable, help="Also draw it, to this PNG.")]

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


def composed(texts: list[str] | None) -> list[Accelerator]:
    """The accelerators of one run, from every `--acceleration` of it."""
    from app.commands.grammar import parse

    return [accelerator for text in texts or () for accelerator in parse(text)]


def read_prompts(file: Path | None) -> list[str]:
    """The prompts of a text file, a line each; none without a file. Raises `BadParameter` for a file without any."""
    if file is None:
        return []
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file} is not UTF-8 text", param_hint="--prompts") from error
    if not any(lines):
        raise typer.BadParameter(f"{file} has no prompts", param_hint="--prompts")
    return [line for line in lines if line]


def open_picture(path: Path, option: str) -> Image.Image:
    """A picture file, upright. Raises `BadParameter` for what is none."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).copy()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise typer.BadParameter(f"{path}: {error}", param_hint=option) from error


def hush() -> None:
    """No bars of the libraries beneath: ours is the only one."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()


def loaded(model: str, **options: Any) -> Backbone:
    """`models.load`, without a word of the libraries beneath."""
    import models

    hush()
    return models.load(model, **options)


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """A bar with count, time gone and time left on standard error, where that is a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        progress.add_task(label, total=None, note="")
        yield progress
