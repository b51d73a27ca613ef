"""A diffusers `BasicTransformerBlock` in its three parts, for DiT's and PixArt's ways of modulation by time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.networks.gated_blocks import BlockInputs


@dataclass(frozen=True, slots=True)
class Begun:
    """What a block makes of its input and of time: `attended` [rows, tokens, dim] enters its self-attention, the rest
    [rows, 1, dim] modulates what comes after."""

    attended: Tensor
    attention_gate: Tensor
    shift: Tensor
    scale: Tensor
    feed_forward_gate: Tensor


def begin(block: Any, h: Tensor, inputs: BlockInputs) -> Begun:
    """Normalise and modulate hidden states h [rows, tokens, dim]."""
    timestep: Any = inputs.rows["timestep"]
    if block.norm_type == "ada_norm_zero":
        attended, *rest = block.norm1(h, timestep, inputs.rows["class_labels"], hidden_dtype=h.dtype)
        return Begun(attended, *(part[:, None] for part in rest))
    table = block.scale_shift_table[None] + timestep.reshape(len(h), 6, -1)
    shift, scale, *rest = table.chunk(6, dim=1)
    return Begun(block.norm1(h) * (1 + scale) + shift, *rest)
