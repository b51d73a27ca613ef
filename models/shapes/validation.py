"""How well a denoiser follows captions it was never trained on: sample with diffusers' DDIM, then ask the checker."""

from dataclasses import dataclass, fields
from itertools import islice

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from PIL import Image
from torch import Tensor, nn

from models.shapes import pictures
from models.shapes.checker import Verdict, check
from models.shapes.networks import noise_scheduler, predict
from models.shapes.shapes import sample_scenes
from models.shapes.text import Encoded, TextEncoder

STEPS = 25
GUIDANCE_SCALES = {"shapes-sd": 2.0, "shapes-dit": 2.0}
"""The models' defaults, chosen by measurement (`--stage validate --scales ...`): the least that does the work."""
CAPTIONS_SEED = 7


@dataclass(frozen=True)
class Result:
    """Pictures with the captions they were asked for and the checker's word on each."""

    captions: list[str]
    pictures: list[Image.Image]
    verdicts: list[Verdict]

    def rates(self) -> dict[str, float]:
        """The share of pictures in which each claim holds; `all` is the alignment."""
        names = [*(field.name for field in fields(Verdict)), "all"]
        return {name: sum(getattr(verdict, name) for verdict in self.verdicts) / len(self.verdicts) for name in names}

    def __str__(self) -> str:
        return ", ".join(f"{name} {rate:.1%}" for name, rate in self.rates().items())


def held_out_captions(count: int) -> list[str]:
    """`count` captions of combinations that are never trained on, half of them with two things."""
    return [scene.caption for scene in islice(sample_scenes(CAPTIONS_SEED, held_out=True), count)]


@torch.no_grad()
def validate(
    network: nn.Module,
    vae: AutoencoderKL,
    text: TextEncoder,
    count: int,
    guidance_scale: float,
    batch: int = 64,
) -> Result:
    """Draw `count` held-out captions, one seed each, and check the pictures."""
    captions = held_out_captions(count)
    drawn: list[Image.Image] = []
    for start in range(0, count, batch):
        part = captions[start : start + batch]
        latents = sample(network, text(part), text([""] * len(part)), guidance_scale, seed=start)
        drawn += pictures.to_pictures(vae.decode(latents / vae.config.scaling_factor).sample)
    return Result(captions, drawn, [check(picture, caption) for picture, caption in zip(drawn, captions, strict=True)])


@torch.no_grad()
def sample(
    network: nn.Module, captions: Encoded, empty: Encoded, guidance_scale: float, seed: int, steps: int = STEPS
) -> Tensor:
    """Latents [captions, 4, 16, 16] after `steps` DDIM steps; a scale of 1 draws without guidance."""
    scheduler: DDIMScheduler = noise_scheduler()
    scheduler.set_timesteps(steps)
    rows = len(captions.tokens)
    device = captions.tokens.device
    latents = torch.randn((rows, 4, 16, 16), generator=torch.Generator().manual_seed(seed)).to(device)
    both = Encoded(torch.cat([captions.tokens, empty.tokens]), torch.cat([captions.mask, empty.mask]))
    for timestep in scheduler.timesteps:
        if guidance_scale == 1.0:
            velocity = predict(network, latents, timestep.expand(rows).to(device), captions)
        else:
            twice = predict(network, latents.repeat(2, 1, 1, 1), timestep.expand(2 * rows).to(device), both)
            guided, free = twice.float().chunk(2)
            velocity = free + guidance_scale * (guided - free)
        latents = scheduler.step(velocity.float(), int(timestep), latents).prev_sample
    return latents
