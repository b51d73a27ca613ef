"""A diffusers `BasicTransformerBlock` in its three parts, for DiT's and PixArt's ways of modulation by time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.networks.attention import AttentionRows
from models.networks.gated_blocks import BlockInputs
from models.networks.modules import by_rows
from models.networks.sites import cross_attention, feed_forward


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


def run(block: Any, number: int, h: Tensor, inputs: BlockInputs, attention: AttentionRows) -> Tensor:
    """The block over hidden states h [rows, tokens, dim], of which any row may take a module's result from memory.

    The same arithmetic as `BasicTransformerBlock.forward`.
    """
    begun = begin(block, h, inputs)
    h = begun.attention_gate * block.attn1(begun.attended, rows=attention) + h
    if block.attn2 is not None:

        def crossed(batch: AttentionRows, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
            out: Tensor = block.attn2(x, encoder_hidden_states=context, attention_mask=mask, rows=batch)
            return out

        given = (h, inputs.rows["encoder_hidden_states"], inputs.rows["encoder_attention_mask"])
        h = by_rows(cross_attention(number), attention, given, crossed) + h
    norm = block.norm3 if block.norm_type == "ada_norm_zero" else block.norm2

    def fed(_: AttentionRows, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        out: Tensor = block.ff(norm(x) * (1 + scale) + shift)
        return out

    fed_forward = by_rows(feed_forward(number), attention, (h, begun.scale, begun.shift), fed)
    return begun.feed_forward_gate * fed_forward + h
