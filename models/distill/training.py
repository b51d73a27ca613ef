"""Distilling guidance into a LoRA: one row a step instead of two (arXiv:2312.00899). Resumable, no pickle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from models.backbone import Backbone
from models.device import fast_bfloat16
from models.distill.data import (
    Noised,
    Prompts,
    Source,
    Trajectories,
    World,
    read_pictures,
)
from models.distill.settings import TRAJECTORIES, Settings, header, remember, trained_steps
from models.distill.student import Pair
from models.distill.task import DistillTask
from models.errors import RequestError, WrongBackbone
from models.fit.loop import Options, fit
from models.loading import load

RENDERED_PICTURES = 4096


def distill(
    model: str | Path,
    output: str | Path,
    *,
    guidance_scale: float | None = None,
    rank: int = 8,
    steps: int = 1000,
    batch: int = 16,
    learning_rate: float | None = None,
    relative: bool = False,
    muon: bool = False,
    data: str | Path = "trajectories",
    start_from: Sequence[Path] = (),
    prompts: Sequence[str] = (),
    num_inference_steps: int | None = None,
    ema_decay: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    checkpoint_seconds: float = 60.0,
    world: World | None = None,
) -> Path:
    """Train a single-pass student of `model` (name, directory or hub id) and return its LoRA file in `output`.

    `data` is "trajectories" (the teacher's guided DDIM runs of `num_inference_steps`, prompts only), "own" (the same by
    the student itself), "shapes" (noised pictures of `world`), or a directory of pictures with captions, noised. Where
    `prompts` are empty, a model that says how its prompts are built gets those of `world`. An interrupted run goes on
    where it was, and so does a finished one that is given more `steps`, or its "own" way after the teacher's
    "trajectories".
    `start_from`: students' files to train on, from their mean (with 0 `steps` the mean alone: a model soup of runs with
    unlike seeds, arXiv:2203.05482). `relative` and `muon` are `DistillTask`'s.
    Weights are float32; `precision` "bfloat16" takes products in less ("auto": where the hardware is made for it).
    Raises `RequestError` for settings that cannot be distilled or that differ from the interrupted run's.
    """
    output = Path(output)
    backbone = load(str(model), device=device, dtype=torch.float32, adapters={}, plans={})
    if backbone.spec.takes != "prompt":
        raise WrongBackbone("model", "a class-conditional model has no prompts to distil on")
    if len(backbone.spec.roles) != 2:
        raise WrongBackbone("model", "a student stands for a guided pair, which this model does not have")
    if backbone.spec.flow is not None:
        raise WrongBackbone("model", "a model of flow matching cannot be distilled")
    scale = backbone.spec.default_guidance_scale if guidance_scale is None else guidance_scale
    if scale <= 1.0:
        raise RequestError("guidance_scale", f"{scale:g} needs one row anyway; a student is for scales above 1")
    count = num_inference_steps or backbone.spec.default_steps
    settings = Settings(
        model=backbone.spec.config_hash,
        guidance_scale=scale,
        rank=rank,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate or (0.008 if muon else 1e-3),
        relative=relative,
        muon=muon,
        data=str(data),
        start_from=[str(file) for file in start_from],
        num_inference_steps=count,
        ema_decay=ema_decay,
        seed=seed,
    )
    headers = [header(file, settings) for file in start_from]
    if steps == 0 and not start_from:
        raise RequestError("steps", "0 is for the mean of start_from; train for at least 1")
    pair = Pair(backbone.family, backbone.network.module, scale, rank, seed)
    if steps == 0:
        pair.load(start_from)
        longest = max(headers, key=trained_steps)
        return pair.save(output, longest)
    folder = output / "training"
    remember(folder, settings)
    source = _source(backbone, settings, prompts, world)
    if not (folder / "student.safetensors").exists():
        if start_from:
            pair.load(start_from)
        if isinstance(source, Trajectories):
            source.spread(lambda one: pair.teacher(*one)[0])
    options = Options(
        folder=folder,
        steps=steps,
        seed=seed,
        warmup=20,
        decay_share=0.95 if muon else 0.6,
        ema_decay=ema_decay,
        autocast=_fast(precision, backbone),
        checkpoint_seconds=checkpoint_seconds,
    )
    fit(DistillTask(pair, source, settings.learning_rate, relative=relative, muon=muon), options)
    before = max(map(trained_steps, headers), default=0)
    return pair.save(output, settings.metadata() | {"steps": before + steps})


def _fast(precision: str, backbone: Backbone) -> bool:
    """Whether to multiply in bfloat16: by default where the hardware does."""
    if precision not in ("auto", "float32", "bfloat16"):
        raise RequestError("precision", f"{precision!r} is not auto, float32 or bfloat16")
    if precision != "auto":
        return precision == "bfloat16"
    return fast_bfloat16(backbone.device)


def _source(backbone: Backbone, settings: Settings, prompts: Sequence[str], world: World | None) -> Source:
    steps, rows = settings.num_inference_steps, settings.batch
    if settings.data in TRAJECTORIES:
        lines = _prompts(backbone, prompts, settings.seed, world)
        return Trajectories(backbone, steps, lines, rows, settings.seed, own=settings.data == "own")
    if settings.data != "shapes":
        return Noised(backbone, steps, read_pictures(Path(settings.data)), rows)
    if world is None:
        raise RequestError("data", "shapes are of a world, and none is given")
    return Noised(backbone, steps, world.pictures(RENDERED_PICTURES, settings.seed), rows)


def _prompts(backbone: Backbone, prompts: Sequence[str], seed: int, world: World | None) -> Prompts:
    if prompts:
        return lambda number: prompts[number % len(prompts)]
    if backbone.spec.prompt_grammar is None or world is None:
        raise RequestError("prompts", f"{backbone.spec.name} does not say what it draws; give prompts to distil on")
    return world.prompts(seed)
