"""A diffusers `BasicTransformerBlock` in its three parts, for DiT's and PixArt's ways of modulation by time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.networks.attention import AttentionRows
from models.networks.gated_blocks import BlockInputs
from models.networks.sites import cross_attention, feed_forward
from models.reuse.rows import Row, keep, segments
from models.reuse.sites import Feature, Site


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

        def crossed(rows: Sequence[Row], x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
            adapted = AttentionRows(rows, segments(rows))
            out: Tensor = block.attn2(x, encoder_hidden_states=context, attention_mask=mask, rows=adapted)
            return out

        given = (h, inputs.rows["encoder_hidden_states"], inputs.rows["encoder_attention_mask"])
        h = _module(cross_attention(number), attention, given, crossed) + h
    norm = block.norm3 if block.norm_type == "ada_norm_zero" else block.norm2

    def fed(_: Sequence[Row], x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        out: Tensor = block.ff(norm(x) * (1 + scale) + shift)
        return out

    fed_forward = _module(feed_forward(number), attention, (h, begun.scale, begun.shift), fed)
    return begun.feed_forward_gate * fed_forward + h


def _module(site: Site, batch: AttentionRows, given: Sequence[Tensor | None], compute: Callable[..., Tensor]) -> Tensor:
    """One module's result [rows, tokens, dim]: computed from `given` for the rows that run it, else remembered."""
    rows, store, places = batch.rows, batch.store, batch.places
    assert store is not None  # noqa: S101
    assert places is not None  # noqa: S101
    recalled = [i for i, row in enumerate(rows) if site in row.plan.reads]
    running = [i for i, row in enumerate(rows) if site not in row.plan.reads]
    parts, members = [], []
    if running:
        active = [rows[i] for i in running]
        computed = compute(active, *(None if t is None else places.take(t, running) for t in given))
        keep(store, places, active, Feature(site, "value"), computed)
        parts, members = [computed], [running]
    if recalled:
        parts.append(store.read([(rows[i].memory, rows[i].plan.reads[site]) for i in recalled]))
        members.append(recalled)
    return places.joined(parts, members)
