"""`slipstream distill`: train the single-pass student of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.commands.options import DeviceOption, FolderOption, ModelOption, PromptsOption, hush, read_prompts


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("distill")(distill)


def distill(
    model: ModelOption,
    output: FolderOption,
    guidance_scale: Annotated[
        float | None, typer.Option(help="The scale to bake in; default the model's.", min=1.0)
    ] = None,
    rank: Annotated[int, typer.Option(min=1, max=256, help="Rank of the adapter.")] = 8,
    steps: Annotated[int, typer.Option(min=0, help="Training steps; 0 for the mean of --start-from.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Images a training step.")] = 16,
    learning_rate: Annotated[float | None, typer.Option(help="Peak; default 0.001, with --muon 0.008.")] = None,
    relative: Annotated[bool, typer.Option(help="Errors relative to what guidance changes in each image.")] = False,
    muon: Annotated[bool, typer.Option(help="Orthogonalised steps instead of AdamW's.")] = False,
    data: Annotated[
        str,
        typer.Option(
            help="'trajectories' of the teacher, the student's 'own', noised 'shapes', or a directory of pictures with "
            ".txt captions."
        ),
    ] = "trajectories",
    start_from: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True, dir_okay=False, help="A student's file to train on; given several times, their mean."
        ),
    ] = None,
    prompts: PromptsOption = None,
    num_inference_steps: Annotated[
        int | None, typer.Option(min=1, help="DDIM steps of a trajectory; default the model's.")
    ] = None,
    ema_decay: Annotated[
        float, typer.Option(min=0.0, max=0.9999, help="Moving average of the adapter; 0 for none.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    precision: Annotated[str, typer.Option(help="auto, float32, or bfloat16 (autocast).")] = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Distil guidance into a LoRA file that needs one row a step. An interrupted run goes on where it was."""
    from models.training import distill as train

    lines = read_prompts(prompts)
    hush()
    file = train(
        model,
        output,
        guidance_scale=guidance_scale,
        rank=rank,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        relative=relative,
        muon=muon,
        data=data,
        start_from=start_from or (),
        prompts=lines,
        num_inference_steps=num_inference_steps,
        ema_decay=ema_decay,
        seed=seed,
        device=device,
        precision=precision,
    )
    typer.echo(f"{file} ({file.stat().st_size / 1e6:.2f} MB)")
