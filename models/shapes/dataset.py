"""What a denoiser trains on: latents of rendered scenes, encoded once and kept on disk, and their encoded captions."""

import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.shapes import pictures
from models.shapes.shapes import Scene, misdescribe, render, sample_scenes
from models.shapes.text import Encoded, TextEncoder

PAIR_SHARE = 0.75  # pairs are harder than single things, so training sees more of them than evaluation
SEED = 11


@dataclass(frozen=True)
class Dataset:
    """`latents` [scenes, 4, 16, 16] of unit variance; `captions` encoded: each scene's own, each with one claim made
    false, and the empty one."""

    latents: Tensor
    captions: Encoded

    def batch(
        self, size: int, empty_share: float, false_share: float, generator: torch.Generator
    ) -> tuple[Tensor, Encoded]:
        """`size` random scenes in float32; a share of the captions is the empty one, another makes a false claim."""
        index = torch.randint(len(self.latents), (size,), generator=generator)
        chance = torch.rand(size, generator=generator)
        told = torch.where(chance > 1 - false_share, len(self.latents) + index, index)
        captions = torch.where(chance < empty_share, 2 * len(self.latents), told)
        chosen = Encoded(self.captions.tokens[captions].float(), self.captions.mask[captions])
        return self.latents[index].float(), chosen


def build(vae: AutoencoderKL, text: TextEncoder, folder: Path, count: int) -> Dataset:
    """The training set; the latents are computed on the first call and found in `folder` afterwards."""
    path = folder / f"latents-{count}.safetensors"
    if not path.exists():
        save_file({"latents": _encode_scenes(vae, count)}, path)
    true, rng = _scenes(count), random.Random(SEED)
    scenes: list[Scene | None] = [*true, *(misdescribe(scene, rng) for scene in true), None]
    return Dataset(load_file(path)["latents"], encode_captions(text, scenes))


@torch.no_grad()
def encode_captions(text: TextEncoder, scenes: list[Scene | None]) -> Encoded:
    """The captions of `scenes` (None: the empty caption), encoded in half precision."""
    captions = [scene.caption if scene else "" for scene in scenes]
    parts = [text(captions[start : start + 256]) for start in range(0, len(captions), 256)]
    tokens = torch.cat([part.tokens.float().cpu() for part in parts])
    return Encoded(tokens.half(), torch.cat([part.mask.cpu() for part in parts]))


def _scenes(count: int) -> list[Scene]:
    return list(islice(sample_scenes(SEED, held_out=False, pair_share=PAIR_SHARE), count))


@torch.no_grad()
def _encode_scenes(vae: AutoencoderKL, count: int) -> Tensor:
    rng = random.Random(SEED)
    scenes = _scenes(count)
    parts = []
    for start in range(0, count, 16):
        images = pictures.to_tensor(render(scene, rng) for scene in scenes[start : start + 16])
        images = images.to(vae.device, memory_format=torch.channels_last)  # convolutions on a CPU are 5 times faster so
        parts.append(vae.encode(images).latent_dist.mean.float().cpu())
    return torch.cat(parts).half().contiguous()
