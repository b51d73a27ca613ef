"""The autoencoder both bundled models share: 64x64 pixels to 16x16 latents of 4 channels."""

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from torch.optim import Optimizer

from models.fit.muon import split_optimizers
from models.shapes import pictures
from models.shapes.shapes import Scene, render, sample_scenes

KL_WEIGHT = 2e-5
EDGE_WEIGHT = 0.1


def build() -> AutoencoderKL:
    """An untrained autoencoder of 0.9 M parameters that shrinks each side four times."""
    widths = (32, 64, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=64,
        scaling_factor=1.0,
        force_upcast=False,
    )


class VaeTask:
    """Squared and absolute error, the same of neighbouring differences (edges), and a whisper of KL."""

    name = "vae"

    def __init__(self, device: torch.device, batch: int = 16, lr: float = 2e-3) -> None:
        self.module = build().to(device)
        self._device, self._batch, self._lr = device, batch, lr
        self._held_out = list(islice(sample_scenes(1, held_out=True), 64))

    def optimizers(self) -> Sequence[Optimizer]:
        return split_optimizers(self.module, self._lr, weight_decay=0.0)

    def loss(self, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**31, (1,), generator=generator))
        images = _render(islice(_training_scenes(seed), self._batch), seed).to(self._device)
        posterior = self.module.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(self._device)
        rebuilt = self.module.decode(posterior.mean + posterior.std * noise).sample.float()
        error = rebuilt - images
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss: Tensor = error.square().mean() + EDGE_WEIGHT * (error.abs().mean() + edges) + KL_WEIGHT * kl
        return loss

    @torch.no_grad()
    def preview(self, folder: Path, step: int) -> str:
        images = _render(self._held_out, 1).to(self._device)
        latents = [self.module.encode(part).latent_dist.mean for part in _parts(images)]
        rebuilt = torch.cat([self.module.decode(part).sample for part in latents])
        pairs = [picture for both in zip(images, rebuilt, strict=True) for picture in both][:32]
        pictures.save_grid(pictures.to_pictures(torch.stack(pairs)), folder / f"vae-{step:06d}.png")
        return f"MSE {F.mse_loss(rebuilt, images).item():.5f} on held-out scenes"


@torch.no_grad()
def whiten(vae: AutoencoderKL, count: int = 1024) -> None:
    """Fold each latent channel's mean and scale into the 1x1 convolutions around the latents.

    Afterwards the latents have zero mean and unit variance with `scaling_factor` 1; pipelines have no shift to apply,
    and a schedule that ends in pure noise wants none. What the decoder gives is unchanged.
    """
    images = _render(islice(_training_scenes(2), count), 2).to(vae.device)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in _parts(images)])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = mean.numel()
    encode, decode = vae.quant_conv, vae.post_quant_conv
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= std[None, :, None, None]
    encode.bias[:channels] = (encode.bias[:channels] - mean) / std
    encode.weight[:channels] /= std[:, None, None, None]
    encode.bias[channels:] -= 2 * std.log()


def _training_scenes(seed: int) -> Iterator[Scene]:
    return sample_scenes(seed, held_out=False, pair_share=0.75)


def _render(scenes: Iterator[Scene] | Sequence[Scene], seed: int) -> Tensor:
    rng = random.Random(seed)
    return pictures.to_tensor(render(scene, rng) for scene in scenes)


def _parts(images: Tensor) -> list[Tensor]:
    return [images[start : start + 32] for start in range(0, len(images), 32)]
