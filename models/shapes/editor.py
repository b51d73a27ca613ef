"""How a U-Net learns to edit, after InstructPix2Pix (https://arxiv.org/abs/2211.09800), and how well it does.

The latents of the picture to edit are four more channels of the network's input; the text encoder learns the words of
instructions along with it. Sampling takes three rows: instruction and picture, picture alone, neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from models.fit.muon import split_optimizers
from models.shapes import pictures
from models.shapes.edits import OPERATIONS, Edit, Outcome, instructions, judge, sample_edits
from models.shapes.networks import noise_scheduler, predict
from models.shapes.text import TextEncoder

SEED = 23
PER_SCENE = 3
DROP_SHARE = 0.05  # of the instructions, of the pictures, and of both together
LEARNING_RATE = 2e-3
TEXT_LEARNING_RATE = 1e-3
VALIDATION_SEED = 29


@dataclass(frozen=True)
class EditData:
    """Latents of scenes `before` [scenes, 4, 16, 16] and of their edits `after` [scenes, PER_SCENE, 4, 16, 16];
    `told` [scenes, PER_SCENE] says which of `instructions()` leads from one to the other."""

    before: Tensor
    after: Tensor
    told: Tensor


def build_data(vae: AutoencoderKL, folder: Path, scenes: int) -> EditData:
    """The training set; encoded on the first call and found in `folder` afterwards."""
    path = folder / f"edits-{scenes}.safetensors"
    if not path.exists():
        save_file(_encode(vae, scenes), path)
    return EditData(**load_file(path))


def _encode(vae: AutoencoderKL, scenes: int) -> dict[str, Tensor]:
    numbers = {words: number for number, words in enumerate(instructions())}
    edits = islice(sample_edits(SEED, held_out=False, per_scene=PER_SCENE), scenes * PER_SCENE)
    before, after, told = [], [], []
    while group := list(islice(edits, 16 * PER_SCENE)):
        before.append(encode(vae, [edit.before.picture() for edit in group[::PER_SCENE]]))
        after.append(encode(vae, [edit.after.picture() for edit in group]))
        told += [numbers[edit.instruction] for edit in group]
    latents = torch.cat(after).half()
    return {
        "before": torch.cat(before).half(),
        "after": latents.reshape(scenes, PER_SCENE, *latents.shape[1:]),
        "told": torch.tensor(told).reshape(scenes, PER_SCENE),
    }


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Sequence[Image.Image]) -> Tensor:
    """Latents [images, 4, 16, 16], the means of their posteriors."""
    tensor = pictures.to_tensor(images).to(vae.device, memory_format=torch.channels_last)
    means: Tensor = vae.encode(tensor).latent_dist.mean.float().cpu()
    return means.contiguous()


class EditTask:
    """Squared error of the velocity; U-Net and text encoder learn together."""

    def __init__(self, name: str, unet: Any, text: TextEncoder, data: EditData, vae: AutoencoderKL, batch: int) -> None:
        self.name = name
        self.module = nn.ModuleDict({"unet": unet, "text": text.network})
        if unet.device.type == "cpu":  # the fused kernel's backward pass takes a quarter of the step there
            unet.set_attn_processor(AttnProcessor())
        self._unet, self._text, self._data, self._vae, self._batch = unet, text, data, vae, batch
        self._alphas = noise_scheduler().alphas_cumprod
        self._words = instructions()

    def optimizers(self) -> Sequence[Optimizer]:
        text = AdamW(self._text.parameters(), lr=TEXT_LEARNING_RATE, weight_decay=0.0)
        return [*split_optimizers(self._unet, LEARNING_RATE), text]

    def loss(self, generator: torch.Generator) -> Tensor:
        scene = torch.randint(len(self._data.before), (self._batch,), generator=generator)
        which = torch.randint(PER_SCENE, (self._batch,), generator=generator)
        chance = torch.rand(self._batch, generator=generator)
        clean, source = self._data.after[scene, which].float(), self._data.before[scene].float()
        source = torch.where(((chance >= DROP_SHARE) & (chance < 3 * DROP_SHARE)).view(-1, 1, 1, 1), 0.0, source)
        told = self._data.told[scene, which].tolist()
        silent = (chance < 2 * DROP_SHARE).tolist()
        captions = self._text(["" if mute else self._words[one] for one, mute in zip(told, silent, strict=True)])
        noise = torch.randn(clean.shape, generator=generator)
        offsets = torch.rand(self._batch, generator=generator)  # one timestep from each slice of the schedule
        # What an edit comes to is settled where there is little but noise: half of the timesteps are the last quarter.
        share = 1 - ((torch.arange(self._batch) + offsets) / self._batch).square()
        timesteps = (share * len(self._alphas)).long().clamp(max=len(self._alphas) - 1)
        signal = self._alphas[timesteps].sqrt().view(-1, 1, 1, 1)
        spread = (1 - self._alphas[timesteps]).sqrt().view(-1, 1, 1, 1)
        noisy, velocity = signal * clean + spread * noise, signal * noise - spread * clean
        device = self._unet.device
        latents = torch.cat([noisy, source], dim=1).to(device)
        predicted = predict(self._unet, latents, timesteps.to(device), captions)
        return F.mse_loss(predicted.float(), velocity.to(device))

    def preview(self, folder: Path, step: int) -> str:
        result = validate(self._unet, self._vae, self._text, 60, SCALES, steps=10)
        shown = [
            picture
            for edit, drawn in zip(result.edits, result.pictures, strict=True)
            for picture in (edit.before.picture(), drawn)
        ]
        pictures.save_grid(shown[:64], folder / f"{self.name}-{step:06d}.png")
        return str(result)


SCALES = (2.0, 1.2)
"""Guidance scales of the text and of the picture."""
STEPS = 25


@dataclass(frozen=True)
class Result:
    """Edits, the pictures that were drawn for them, and the judge's word on each."""

    edits: list[Edit]
    pictures: list[Image.Image]
    outcomes: list[Outcome]

    def rates(self) -> dict[str, float]:
        """Shares: `done`, `rest`, `all`, and `all` of each operation."""
        rates = {
            "done": _share([one.done for one in self.outcomes]),
            "rest": _share([one.rest for one in self.outcomes]),
            "all": _share([one.all for one in self.outcomes]),
        }
        for name in OPERATIONS:
            pairs = zip(self.edits, self.outcomes, strict=True)
            rates[name] = _share([one.all for edit, one in pairs if edit.operation == name])
        return rates

    def __str__(self) -> str:
        return ", ".join(f"{name} {rate:.1%}" for name, rate in self.rates().items())


def _share(truths: Sequence[bool]) -> float:
    return sum(truths) / max(1, len(truths))


def held_out_edits(count: int) -> list[Edit]:
    """`count` edits of scenes that are never trained on."""
    return list(islice(sample_edits(VALIDATION_SEED, held_out=True), count))


@torch.no_grad()
def validate(
    unet: nn.Module,
    vae: AutoencoderKL,
    text: TextEncoder,
    count: int,
    scales: tuple[float, float],
    steps: int = STEPS,
    batch: int = 60,
) -> Result:
    """Carry out `count` held-out edits, one seed each, and judge the pictures."""
    edits = held_out_edits(count)
    drawn: list[Image.Image] = []
    for start in range(0, count, batch):
        part = edits[start : start + batch]
        latents = sample(unet, vae, text, part, scales, seed=start, steps=steps)
        drawn += pictures.to_pictures(vae.decode(latents / vae.config.scaling_factor).sample)
    return Result(edits, drawn, [judge(picture, edit) for picture, edit in zip(drawn, edits, strict=True)])


@torch.no_grad()
def sample(
    unet: nn.Module,
    vae: AutoencoderKL,
    text: TextEncoder,
    edits: Sequence[Edit],
    scales: tuple[float, float],
    seed: int,
    steps: int,
) -> Tensor:
    """Latents [edits, 4, 16, 16] after `steps` DDIM steps of three rows each."""
    scheduler: DDIMScheduler = noise_scheduler()
    scheduler.set_timesteps(steps)
    rows, device = len(edits), vae.device
    source = encode(vae, [edit.before.picture() for edit in edits]).to(device)
    sources = torch.cat([source, source, torch.zeros_like(source)])
    captions = text([*(edit.instruction for edit in edits), *[""] * (2 * rows)])
    latents = torch.randn((rows, 4, 16, 16), generator=torch.Generator().manual_seed(seed)).to(device)
    for timestep in scheduler.timesteps:
        thrice = torch.cat([latents.repeat(3, 1, 1, 1), sources], dim=1)
        velocity = predict(unet, thrice, timestep.expand(3 * rows).to(device), captions).float()
        told, seen, free = velocity.chunk(3)
        velocity = free + scales[0] * (told - seen) + scales[1] * (seen - free)
        latents = scheduler.step(velocity, int(timestep), latents).prev_sample
    return latents
