"""The same pictures by diffusers' own pipelines, and by a plain loop where diffusers has none or drives it wrongly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from models.solvers.names import REGISTRY, takes


class Drawn(NamedTuple):
    """Final latents [images, channels, h, w] and their pictures."""

    latents: Tensor
    images: list[Image.Image]


def scheduler_for(pipeline: Any, name: str) -> Any:
    """A fresh scheduler of ours by name, made as diffusers' documentation says."""
    cls, options = REGISTRY[name]
    return cls.from_config(pipeline.scheduler.config, **options)  # type: ignore[attr-defined]


def generators(seed: int, images: int) -> list[torch.Generator]:
    """One generator an image: image i is drawn from seed + i."""
    return [torch.Generator().manual_seed(seed + i) for i in range(images)]


def by_pipeline(
    pipeline: Any,
    scheduler: str,
    *,
    image: Image.Image | None = None,
    within: Callable[[Any], AbstractContextManager[None]] = nullcontext,
    **inputs: Any,
) -> Drawn:
    """Call the pipeline (or its image-to-image sister) with a fresh scheduler; the latents are its last step's.

    `within` is entered around the call with the pipeline that is called.
    """
    components = {**pipeline.components, "scheduler": scheduler_for(pipeline, scheduler)}
    cls = type(pipeline)
    if image is not None:
        sisters = {
            "StableDiffusionPipeline": StableDiffusionImg2ImgPipeline,
            "StableDiffusionXLPipeline": StableDiffusionXLImg2ImgPipeline,
        }
        cls = sisters.get(cls.__name__, cls)  # one that edits takes the picture itself
        inputs["image"] = image
    if cls.__name__.startswith("StableDiffusion") and "XL" not in cls.__name__:
        components["requires_safety_checker"] = False
    called = cls(**components)
    called.set_progress_bar_config(disable=True)
    steps = _recorded(called.scheduler)
    with within(called):
        images = called(**inputs).images
    return Drawn(steps[-1][: len(images)], images)


def _recorded(scheduler: Any) -> list[Tensor]:
    """The results of every step that this scheduler will take."""
    plain, results = scheduler.step, []

    @functools.wraps(plain)
    def step(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        results.append(result[0])
        return result

    scheduler.step = step
    return results


@torch.inference_mode()
def by_loop(
    pipeline: Any,
    scheduler_name: str,
    conditioning: Sequence[dict[str, Tensor]],
    *,
    steps: int,
    scale: float,
    seeds: Sequence[torch.Generator],
    encoded: Tensor | None = None,
    strength: float = 1.0,
    size: tuple[int, int] = (16, 16),
) -> Drawn:
    """Denoise with a transformer, one scheduler an image. `conditioning` is the pair's, or the conditional row's.

    With `encoded` latents [images, channels, h, w] the run begins part of the way in, from them and noise.
    """
    network = pipeline.transformer
    schedulers = [scheduler_for(pipeline, scheduler_name) for _ in seeds]
    for scheduler in schedulers:
        scheduler.set_timesteps(steps)
    order = schedulers[0].order
    begin = (steps - min(int(steps * strength), steps)) * order
    noise = torch.cat([randn_tensor((1, network.config.in_channels, *size), g, dtype=network.dtype) for g in seeds])
    timesteps = schedulers[0].timesteps[begin:]
    for scheduler in schedulers:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
    if encoded is None:
        latents = noise * schedulers[0].init_noise_sigma
    else:
        latents = schedulers[0].add_noise(encoded, noise, timesteps[:1].repeat(len(noise)))
    inputs = {k: _repeated([c[k] for c in conditioning], len(noise)) for k in conditioning[0]}
    kind: type = type(schedulers[0])
    options = dict(takes(kind))
    extra = {} if "class_labels" in inputs else {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    for t in timesteps:
        x = torch.cat([s.scale_model_input(x, t) for s, x in zip(schedulers, latents.split(1), strict=True)])
        rows = torch.cat([x] * len(conditioning))
        prediction = network(rows, timestep=t.expand(len(rows)), **inputs, **extra).sample
        prediction = prediction[:, : latents.shape[1]]
        if len(conditioning) == 2:
            negative, positive = prediction.chunk(2)
            if "class_labels" in inputs:
                negative, positive = positive, negative  # DiTPipeline batches [conditional, unconditional]
            prediction = negative + scale * (positive - negative)
        stepped = [
            s.step(p, t, x, **{**options, **({"generator": g} if "generator" in options else {})}).prev_sample
            for s, p, x, g in zip(schedulers, prediction.split(1), latents.split(1), seeds, strict=True)
        ]
        latents = torch.cat(stepped)
    pixels = pipeline.vae.decode(_unscaled(latents, pipeline)).sample
    return Drawn(latents, VaeImageProcessor(vae_scale_factor=2).postprocess(pixels, "pil"))


def _unscaled(latents: Tensor, pipeline: Any) -> Tensor:
    factor: float = pipeline.vae.config.scaling_factor
    if hasattr(pipeline, "text_encoder"):
        return latents / factor
    return 1 / factor * latents  # as DiTPipeline writes it


def _repeated(values: list[Tensor], images: int) -> Tensor:
    return torch.cat([v.repeat(images, *[1] * (v.ndim - 1)) for v in values])


def class_conditioning(label: int, guided: bool) -> list[dict[str, Tensor]]:
    """DiTPipeline's rows: [conditional, unconditional]."""
    labels = [label, 1000] if guided else [label]
    return [{"class_labels": torch.tensor([value])} for value in labels]


@torch.inference_mode()
def text_conditioning(pipeline: Any, prompt: str, negative: str, guided: bool) -> list[dict[str, Tensor]]:
    """PixArt's rows: [unconditional, conditional]."""
    length = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}[type(pipeline).__name__]
    embeds, mask, negative_embeds, negative_mask = pipeline.encode_prompt(
        prompt, guided, negative, device="cpu", max_sequence_length=length
    )
    rows = [{"encoder_hidden_states": embeds, "encoder_attention_mask": mask}]
    if guided:
        rows.insert(0, {"encoder_hidden_states": negative_embeds, "encoder_attention_mask": negative_mask})
    return rows
