"""What a U-Net is made of: input blocks, and the output blocks that close them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Level:
    """Input block l and the output block L-1-l that closes it."""

    down: nn.Module  # conv_in, a resnet, or a downsampler
    down_attention: nn.Module | None
    up: nn.Module  # a resnet over [inner, skip]
    up_attention: nn.Module | None
    upsampler: nn.Module | None
    inner_channels: int  # of the hidden state that enters the output block
    skip_channels: int  # of the one that leaves the input block


def levels_of(unet: Any) -> tuple[Level, ...]:
    """Pair the input blocks of a U-Net with the output blocks that close them."""
    downs: list[tuple[nn.Module, nn.Module | None]] = [(unet.conv_in, None)]
    for block in unet.down_blocks:
        downs += zip(block.resnets, _attentions(block), strict=True)
        downs += [(module, None) for module in getattr(block, "downsamplers", None) or ()]
    ups: list[tuple[nn.Module, nn.Module | None, nn.Module | None]] = []
    for block in unet.up_blocks:
        samplers = list(getattr(block, "upsamplers", None) or ())
        tails = [None] * (len(block.resnets) - 1) + [samplers[0] if samplers else None]
        ups += zip(block.resnets, _attentions(block), tails, strict=True)
    channels = [_out_channels(module) for module, _ in downs]
    return tuple(
        Level(*down, *up, inner_channels=up[0].in_channels - skip, skip_channels=skip)  # type: ignore[arg-type, operator]
        for down, up, skip in zip(downs, reversed(ups), channels, strict=True)
    )


def _attentions(block: Any) -> list[nn.Module | None]:
    return list(getattr(block, "attentions", None) or [None] * len(block.resnets))


def _out_channels(module: Any) -> int:
    return int(module.out_channels)
