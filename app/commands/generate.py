"""`slipstream generate`: pictures without a server, by the same engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.commands.options import (
    AccelerationOption,
    AdapterOption,
    ConfigOption,
    ControlOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    PictureOption,
    PlanOption,
    ProfileOption,
    ScaleOption,
    SchedulerOption,
    SizeOption,
    SteppingOption,
    StepsOption,
    composed,
    console,
    loaded,
    open_picture,
    parse_named,
    parse_size,
    progress_bar,
)

if TYPE_CHECKING:
    from models.request import LoraScale


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    model: ModelOption = "shapes-sd",
    steps: StepsOption = None,
    guidance_scale: ScaleOption = None,
    true_cfg_scale: Annotated[
        float | None, typer.Option(help="Guidance by the negative prompt, where the other scale is an input.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    seed: Annotated[int, typer.Option(help="The noise; image i is drawn from seed + i.")] = 0,
    num_images: Annotated[int, typer.Option(help="How many.")] = 1,
    scheduler: SchedulerOption = None,
    size: SizeOption = None,
    image: Annotated[Path | None, typer.Option(help="A picture to start from, or to edit.")] = None,
    image_guidance_scale: Annotated[
        float | None, typer.Option(help="How close an edit stays to it, where the model edits.")
    ] = None,
    strength: Annotated[float | None, typer.Option(help="How much of it to redo, 0 to 1; default 0.8.")] = None,
    mask: Annotated[
        Path | None, typer.Option(help="What of --image is repainted: transparent, or in a grey mask white; its size.")
    ] = None,
    control_image: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE[,scale=S][,start=S][,stop=S]: what a control network sees, and how it acts."),
    ] = None,
    timestep_warp: Annotated[float, typer.Option(help="γ of warped time steps.")] = 1.0,
    class_label: Annotated[int | None, typer.Option(help="The class, for class-conditional models.")] = None,
    acceleration: AccelerationOption = None,
    quality: Annotated[
        str | None, typer.Option(help="low, medium, high or auto, in place of --acceleration: what auto prefers.")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option("--lora", help="NAME or NAME:SCALE of a registered style; may be repeated.")
    ] = None,
    adapter: AdapterOption = None,
    control: ControlOption = None,
    plan: PlanOption = None,
    profile: ProfileOption = None,
    config: ConfigOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    stepping: SteppingOption = "auto",
    output: PictureOption = Path("image.png"),
) -> None:
    """Draw one prompt into a file. Several images get -0, -1 … before the suffix."""
    from models import Request
    from models import generate as run

    width, height = parse_size(size)
    accelerators = composed(acceleration)
    start = None if image is None else open_picture(image, "--image").convert("RGB")
    cover = None if mask is None else open_picture(mask, "--mask")
    steering = [_steered(text) for text in control_image or ()]
    backbone = loaded(
        model,
        device=device,
        dtype=dtype,
        stepping=stepping,
        adapters=parse_named(adapter, "--adapter"),
        controls=parse_named(control, "--control"),
        plans=parse_named(plan, "--plan"),
        profiles=parse_named(profile, "--profile"),
        config=config,
    )
    request = Request(
        prompt=prompt,
        negative_prompt=negative_prompt,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
        image_guidance_scale=image_guidance_scale,
        control=tuple(steering),
        seed=seed,
        num_images=num_images,
        scheduler=scheduler,
        image=start,
        strength=strength,
        mask=cover,
        timestep_warp=timestep_warp,
        class_label=class_label,
        acceleration=accelerators,
        quality=quality,
        loras=tuple(_lora(text) for text in lora or ()),
    )
    with progress_bar("denoising") as bar:
        task = bar.task_ids[0]
        result = run(backbone, [request], progress=lambda done, total: bar.update(task, completed=done, total=total))[0]
    for i, picture in enumerate(result.images):
        path = output if num_images == 1 else output.with_stem(f"{output.stem}-{i}")
        picture.save(path)
        console.print(f"[bold]{path}[/bold]  seed {result.seeds[i]}")
    if (chosen := result.profile) is not None:
        promised = ", ".join(f"{name} {value:g}" for name, value in chosen.promised.items())
        console.print(f"chosen: [bold]{chosen.candidate}[/bold] of {chosen.name}; promised: {promised}")
        for difference in chosen.differences:
            console.print(f"  {difference}")
    usage = result.usage
    saved = 1 - usage.macs / usage.macs_unaccelerated
    console.print(f"{usage.steps} steps, {usage.rows} rows, {usage.macs / 1e9:.3f} GMACs ({saved:.0%} saved)")


def _lora(text: str) -> LoraScale:
    from models.request import LoraScale

    name, _, scale = text.partition(":")
    try:
        return LoraScale(name, float(scale) if scale else 1.0)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not NAME:SCALE", param_hint="--lora") from error


def _steered(text: str) -> Any:
    """`canny=edges.png,scale=0.8` as a `models.Control`."""
    from models.request import Control

    named, *settings = text.split(",")
    [(name, path)] = parse_named([named], "--control-image").items()
    numbers: dict[str, float] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            numbers[key] = float(value)
        except ValueError:
            raise typer.BadParameter(f"{setting!r} is not KEY=NUMBER", param_hint="--control-image") from None
        if key not in ("scale", "start", "stop"):
            raise typer.BadParameter(f"{key!r} is not one of scale, start, stop", param_hint="--control-image")
    return Control(name, open_picture(Path(path), "--control-image").convert("RGB"), **numbers)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(generate)
