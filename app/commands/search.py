"""`slipstream plan` and `slipstream warp`: the searches, with a bar, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from app.commands.options import (
    DeviceOption,
    DtypeOption,
    FileOption,
    ModelOption,
    PlotOption,
    PromptsOption,
    ScaleOption,
    SchedulerOption,
    SizeOption,
    StepsOption,
    console,
    loaded,
    open_picture,
    parse_size,
    progress_bar,
    read_prompts,
    writable,
)

CountOption = Annotated[int, typer.Option("--count", min=1, help="How many calibration pictures.")]


def plan(
    threshold: Annotated[float, typer.Option(min=0.0, help="δ; 0.025, 0.05 … 0.15 are D1 … D6.")],
    model: ModelOption = "shapes-dit",
    steps: StepsOption = None,
    window: Annotated[int | None, typer.Option(min=1, help="Half width of the band; default tokens / 8.")] = None,
    metric: Annotated[str, typer.Option(help="paper or signed (as the paper's code).")] = "paper",
    guidance_scale: ScaleOption = None,
    scheduler: SchedulerOption = None,
    size: SizeOption = None,
    prompts: PromptsOption = None,
    count: CountOption = 4,
    picture: PlotOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    output: FileOption = Path("plan.json"),
) -> None:
    """Search a DiTFastAttn plan. Stopped with Ctrl-C it goes on from where it was."""
    from models import Request, search_plan

    if metric not in ("paper", "signed"):
        raise typer.BadParameter(f"{metric!r} is not paper or signed", param_hint="--metric")
    width, height = parse_size(size)
    lines = read_prompts(prompts)
    backbone = loaded(model, device=device, dtype=dtype)
    common: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "scheduler": scheduler,
        "width": width,
        "height": height,
    }
    if backbone.spec.takes == "class_label":
        classes = backbone.spec.num_classes or 1
        requests = [Request(class_label=i * classes // count, seed=i, **common) for i in range(count)]
    else:
        texts = _prompts(lines, backbone.spec.examples, count)
        requests = [Request(prompt=text, seed=i, **common) for i, text in enumerate(texts)]
    checkpoint = output.with_suffix(".search.json")
    with progress_bar("searching") as bar:
        found = search_plan(
            backbone,
            requests,
            threshold=threshold,
            window=window,
            metric="paper" if metric == "paper" else "signed",
            checkpoint=checkpoint,
            progress=lambda done, total: bar.update(bar.task_ids[0], completed=done, total=total),
        )
    found.save(output)
    checkpoint.unlink()
    if picture is not None:
        found.draw(picture)
    console.print(f"[bold]{output}[/bold]  {dict(found.counts)}")


def warp(
    images: Annotated[Path, typer.Option(help="A directory of pictures to start from.", exists=True, file_okay=False)],
    model: ModelOption = "shapes-sd",
    steps: Annotated[int, typer.Option(help="The few steps to make the best of (5, 10, 15, 20).")] = 10,
    reference_steps: Annotated[int, typer.Option(help="The many steps to come close to.")] = 50,
    strength: Annotated[float | None, typer.Option(help="Image-to-image strength; default 0.8.")] = None,
    guidance_scale: ScaleOption = None,
    prompts: PromptsOption = None,
    count: CountOption = 8,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    checkpoint: Annotated[
        Path | None, typer.Option(callback=writable, help="Where to keep what was tried, to go on later.")
    ] = None,
) -> None:
    """Hill-climb γ of warped time steps, for image-to-image."""
    from models import Request, search_warp

    lines = read_prompts(prompts)
    files = sorted(p for p in images.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))[:count]
    if not files:
        raise typer.BadParameter(f"{images}: no PNG, JPEG or WebP in it", param_hint="--images")
    pictures = [open_picture(file, "--images").convert("RGB") for file in files]
    backbone = loaded(model, device=device, dtype=dtype)
    texts = _prompts(lines, backbone.spec.examples, len(files))
    requests = [
        Request(prompt=text, image=picture, strength=strength, guidance_scale=guidance_scale, seed=i)
        for i, (picture, text) in enumerate(zip(pictures, texts, strict=True))
    ]
    with progress_bar("climbing") as bar:
        found = search_warp(
            backbone,
            requests,
            num_inference_steps=steps,
            reference_steps=reference_steps,
            checkpoint=checkpoint,
            progress=lambda gamma, psnr: _note(bar, gamma, psnr),
        )
    console.print(f"γ = [bold]{found.gamma:g}[/bold]  PSNR {found.psnr:.2f} dB, without warp {found.tried[1.0]:.2f} dB")


def _note(bar: Progress, gamma: float, psnr: float) -> None:
    bar.advance(bar.task_ids[0])
    bar.update(bar.task_ids[0], note=f"γ = {gamma:g}: {psnr:.2f} dB")


def _prompts(lines: list[str], examples: tuple[str, ...], count: int) -> list[str]:
    texts = lines or list(examples)
    if not texts:
        raise typer.BadParameter("the model has no examples; give a file of prompts", param_hint="--prompts")
    return [texts[i % len(texts)] for i in range(count)]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(plan)
    app.command()(warp)
