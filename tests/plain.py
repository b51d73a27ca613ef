"""A U-Net denoised by a plain loop: one image, everything computed, with hooks that put in what a cache would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from models.solvers.names import takes
from tests.reference import scheduler_for

Inner = Literal["computed", "remembered", "zeros"]
"""What enters the output block that closes a level: what was computed, that of the last computed step, or zeros."""


def denoise(
    pipeline: Any,
    scheduler_name: str,
    *,
    steps: int,
    scale: float = 3.0,
    seed: int = 0,
    size: tuple[int, int] = (16, 16),
    prompt: str = "a red circle",
    negative: str = "dull",
    guided: Callable[[int], bool] = lambda _: True,
    level: int = 0,
    inner: Callable[[int], Inner] = lambda _: "computed",
) -> Tensor:
    """Final latents [1, channels, h, w] of Stable Diffusion; `size` is the latents', `guided` and `inner` go by step.

    Only the conditional row is remembered over a step without guidance.
    """
    with torch.inference_mode(), _Level(pipeline.unet, level, inner) as remembering:
        return _denoise(pipeline, scheduler_name, steps, scale, seed, size, (prompt, negative), guided, remembering)


def _denoise(
    pipeline: Any,
    scheduler_name: str,
    steps: int,
    scale: float,
    seed: int,
    size: tuple[int, int],
    texts: tuple[str, str],
    guided: Callable[[int], bool],
    remembering: _Level,
) -> Tensor:
    unet, generator = pipeline.unet, torch.Generator().manual_seed(seed)
    embeds, negatives = pipeline.encode_prompt(texts[0], "cpu", 1, True, texts[1])
    scheduler = scheduler_for(pipeline, scheduler_name)
    scheduler.set_timesteps(steps)
    noise = randn_tensor((1, unet.config.in_channels, *size), generator, dtype=unet.dtype)
    latents: Tensor = noise * scheduler.init_noise_sigma
    kind: type = type(scheduler)
    options = dict(takes(kind))
    if "generator" in options:
        options["generator"] = generator
    for step, t in enumerate(scheduler.timesteps):
        x = scheduler.scale_model_input(latents, t)
        remembering.begin(step, rows=2 if guided(step) else 1)
        if guided(step):
            u, c = unet(torch.cat([x, x]), t, torch.cat([negatives, embeds])).sample.chunk(2)
            prediction = u + scale * (c - u)
        else:
            prediction = unet(x, t, embeds).sample
        latents = scheduler.step(prediction, t, latents, **options).prev_sample
    return latents


class _Level:
    """A hook on the output block that closes a level: it sees the hidden state and the skip side by side."""

    def __init__(self, unet: Any, level: int, inner: Callable[[int], Inner]) -> None:
        blocks: list[Any] = [resnet for block in unet.up_blocks for resnet in block.resnets]
        self._block: Any = blocks[len(blocks) - 1 - level]
        self._channels: int = self._block.in_channels - _input_channels(unet)[level]
        self._inner = inner
        self._remembered = torch.empty(0)
        self._step = 0

    def begin(self, step: int, rows: int) -> None:
        """Announce the next forward; rows [unconditional, conditional], or the conditional alone."""
        self._step = step
        self._remembered = self._remembered[-rows:]

    def _hook(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        joined = inputs[0]
        kind = self._inner(self._step)
        hidden = joined[:, : self._channels]
        if kind == "computed":
            self._remembered = hidden.clone()
        put = {"computed": hidden, "remembered": self._remembered, "zeros": torch.zeros_like(hidden)}[kind]
        return (torch.cat([put, joined[:, self._channels :]], dim=1), *inputs[1:])

    def __enter__(self) -> _Level:
        self._handle = self._block.register_forward_pre_hook(self._hook)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def _input_channels(unet: Any) -> list[int]:
    channels = [unet.conv_in.out_channels]
    for block in unet.down_blocks:
        channels += [resnet.out_channels for resnet in block.resnets]
        channels += [sampler.out_channels for sampler in block.downsamplers or ()]
    return channels
