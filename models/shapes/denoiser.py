"""How a denoiser learns to predict velocity from latents and encoded captions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch.optim import Optimizer

from models.fit.muon import split_optimizers
from models.shapes import pictures
from models.shapes.dataset import Dataset
from models.shapes.networks import noise_scheduler, predict
from models.shapes.text import Encoded, TextEncoder
from models.shapes.validation import GUIDANCE_SCALES, validate

EMPTY_SHARE = 0.1
LEARNING_RATE = 2e-3


class DenoiserTask:
    """Squared error of the velocity.

    A tenth of the captions is empty, so that guidance has its other half, and `false_share` of them make one false
    claim, as captions found in the world do: guidance then has something to mend.
    """

    def __init__(
        self,
        name: str,
        network: Any,
        data: Dataset,
        vae: AutoencoderKL,
        text: TextEncoder,
        batch: int = 48,
        false_share: float = 0.1,
    ) -> None:
        self.name = name
        self.module = network
        if network.device.type == "cpu":  # the fused kernel's backward pass takes a quarter of the step there
            network.set_attn_processor(AttnProcessor())
        self._data, self._vae, self._text = data, vae, text
        self._batch, self._false_share = batch, false_share
        self._alphas = noise_scheduler().alphas_cumprod

    def optimizers(self) -> Sequence[Optimizer]:
        return split_optimizers(self.module, LEARNING_RATE)

    def loss(self, generator: torch.Generator) -> Tensor:
        clean, captions = self._data.batch(self._batch, EMPTY_SHARE, self._false_share, generator)
        noise = torch.randn(clean.shape, generator=generator)
        # One timestep from each of `batch` equal slices of the schedule: the same mean, less variance.
        offsets = torch.rand(self._batch, generator=generator)
        timesteps = ((torch.arange(self._batch) + offsets) / self._batch * len(self._alphas)).long()
        signal = self._alphas[timesteps].sqrt().view(-1, 1, 1, 1)
        spread = (1 - self._alphas[timesteps]).sqrt().view(-1, 1, 1, 1)
        device = next(self.module.parameters()).device
        noisy, velocity = signal * clean + spread * noise, signal * noise - spread * clean
        captions = Encoded(captions.tokens.to(device), captions.mask.to(device))
        predicted = predict(self.module, noisy.to(device), timesteps.to(device), captions)
        return F.mse_loss(predicted.float(), velocity.to(device))

    def preview(self, folder: Path, step: int) -> str:
        result = validate(self.module, self._vae, self._text, 64, GUIDANCE_SCALES[self.name])
        pictures.save_grid(result.pictures[:32], folder / f"{self.name}-{step:06d}.png")
        return str(result)
