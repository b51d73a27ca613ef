"""What a U-Net is made of: input blocks, and the output blocks that close them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Input = tuple[nn.Module, nn.Module | None]
"""An input block: `conv_in`, a resnet or a downsampler; and the attention behind it."""


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
    downs = inputs_of(unet)
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


def inputs_of(unet: Any) -> list[Input]:
    """The input blocks of a U-Net, or of half of one."""
    downs: list[Input] = [(unet.conv_in, None)]
    for block in unet.down_blocks:
        downs += zip(block.resnets, _attentions(block), strict=True)
        downs += [(module, None) for module in getattr(block, "downsamplers", None) or ()]
    return downs


def run_input(block: Input, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
    """Hidden states [rows, channels, h, w] through an input block, all rows alike."""
    module, attention = block
    out: Tensor = module(x, emb) if hasattr(module, "time_emb_proj") else module(x)
    return out if attention is None else _attend(attention, out, context)


def run_middle(middle: Any, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
    """The same through the middle of a U-Net."""
    h: Tensor = middle.resnets[0](x, emb)
    for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
        h = resnet(_attend(attention, h, context), emb)
    return h


def _attend(attention: nn.Module, x: Tensor, context: Tensor) -> Tensor:
    out: Tensor = attention(x, encoder_hidden_states=context, return_dict=False)[0]
    return out


def _attentions(block: Any) -> list[nn.Module | None]:
    return list(getattr(block, "attentions", None) or [None] * len(block.resnets))


def _out_channels(module: Any) -> int:
    return int(module.out_channels)
