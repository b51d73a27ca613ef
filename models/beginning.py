"""What a trajectory begins with: noise, a picture with noise on it, and what a mask keeps of the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from models.backbone import Backbone
from models.families.vae import as_pixels
from models.masks import Outside, weights
from models.request import Run
from models.reuse.rows import Conditioning, RowControl
from models.solvers.exact import mixture
from models.solvers.tables import Table


@dataclass(frozen=True, slots=True)
class Pictures:
    """What is made of a run's pictures, once for all its images.

    The distributions of what it starts from and of what a mask leaves of that, and by step what steers its rows.
    """

    image: Any = None
    left: Any = None
    controls: tuple[tuple[RowControl, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Beginning:
    """The first latents [1, channels, h, w], what is kept for a mask, and what each row is given beside them."""

    latents: Tensor
    outside: Outside | None
    beside: Conditioning
    kept_bytes: int = 0


def encode(backbone: Backbone, run: Run) -> Pictures:
    """Encode the pictures of a run."""
    picture, mask, controls = run.request.image, run.request.mask, steering(backbone, run)
    if picture is None or backbone.spec.edits:
        return Pictures(controls=controls)
    left = None if mask is None or not backbone.spec.inpaints else backbone.posterior(picture, mask)
    return Pictures(None if left is not None and _from_noise(run) else backbone.posterior(picture), left, controls)


def steering(backbone: Backbone, run: Run) -> tuple[tuple[RowControl, ...], ...]:
    """What steers the rows of each step; each picture is embedded once."""
    made: dict[int, RowControl] = {}
    for one in run.request.controls:
        network = backbone.controls[one.name]
        pixels = as_pixels(one.image, backbone.device, backbone.dtype)
        hint = network.hint(pixels.repeat(backbone.hint_rows(run), 1, 1, 1))[:1]
        made[id(one)] = RowControl(network, hint.clone(), one.scale)
    return tuple(tuple(made[id(one)] for one in run.controls(step)) for step in range(len(run.steps))) if made else ()


def begin(
    backbone: Backbone,
    run: Run,
    i: int,
    scheduler: Any,
    solver: Table | None,
    generator: torch.Generator,
    pictures: Pictures,
) -> Beginning:
    """The beginning of image `i`; everything is drawn in the order in which diffusers draws it.

    Latents are in float32 at least where a table is followed.
    """
    scale, mask = backbone.spec.latent_scale, run.request.mask
    height, width = run.height // scale, run.width // scale
    shape = (1, backbone.spec.latent_channels, height, width)
    device, dtype = backbone.device, backbone.dtype if solver is None else backbone.latent_dtype
    clean = None if pictures.image is None else backbone.draw(pictures.image, generator).to(dtype)
    if run.request.latents is not None:
        noise = run.request.latents[i : i + 1].to(device, dtype)
    else:
        noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    if clean is not None and mask is not None and backbone.spec.flow is None:
        clean = clean.contiguous()  # as diffusers has it here: how latents lie in memory shows in their last bits
    if clean is None or (mask is not None and _from_noise(run)):
        latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    else:
        signal, sigma = mixture(scheduler, run.schedule.timesteps[:1], dtype) if solver is None else solver.add_noise
        terms = (signal * clean, sigma * noise)
        # In diffusers' order, which settles how the sum lies in memory.
        latents = terms[1] + terms[0] if backbone.spec.flow is not None else terms[0] + terms[1]
    hints = {id(one.hint): one.hint.nbytes for step in pictures.controls for one in step}
    kept = sum(hints.values())
    if mask is None:
        return Beginning(latents, None, {}, kept)
    if pictures.left is not None:
        inside = weights(mask, height, width, device, backbone.dtype)
        beside = torch.cat([inside, backbone.draw(pictures.left, generator)], dim=1)
        return Beginning(latents, None, {"beside": beside}, kept + beside.nbytes)
    assert clean is not None  # noqa: S101
    randn_tensor(shape, generator=generator, dtype=dtype)  # diffusers draws what the mask leaves, and does not use it
    outside = Outside(clean, noise, weights(mask, height, width, device, dtype))
    return Beginning(latents, outside, {}, kept + outside.nbytes)


def _from_noise(run: Run) -> bool:
    """Whether a masked run begins with nothing of its picture, as diffusers' inpainting does at full strength."""
    return run.request.strength == 1.0
