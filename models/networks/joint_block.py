"""A block over two streams, text and image, in its modules; the same arithmetic as diffusers' own blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.networks.attention import AttentionRows
from models.networks.dit_block import Begun
from models.networks.joint_attention import Rope, Streams
from models.networks.modules import by_rows, touches
from models.networks.sites import feed_forward, image_attention


class Again(NamedTuple):
    """What enters the second attention of the image's tokens, [rows, tokens, dim], and its gate [rows, 1, dim]."""

    attended: Tensor
    gate: Tensor


@dataclass(frozen=True, slots=True)
class JointBegun:
    """What a joint block makes of its streams and of time. A block that leaves the text as it is has only what of it is
    attended to."""

    image: Begun
    text: Begun | Tensor
    again: Again | None = None


def begun(parts: Sequence[Tensor]) -> Begun:
    """What diffusers' `AdaLayerNormZero` gives: hidden states, and modulations [rows, dim]."""
    attended, *rest = parts
    return Begun(attended, *(part[:, None] for part in rest))


def run(
    block: Any, number: int, streams: Streams, start: JointBegun, rope: Rope | None, batch: AttentionRows | None
) -> Streams:
    """The block over image and text [rows, tokens, dim], of which any row may take a module's result from memory."""
    image, text = streams
    of_image, of_text = start.image, start.text
    options: dict[str, Any] = {"rows": batch} if rope is None else {"rows": batch, "image_rotary_emb": rope}
    attended = of_text.attended if isinstance(of_text, Begun) else of_text
    image_out, text_out = block.attn(of_image.attended, encoder_hidden_states=attended, **options)
    image = image + of_image.attention_gate * image_out
    if isinstance(of_text, Begun):
        text = text + of_text.attention_gate * text_out
    if start.again is not None:
        own = _at(batch, image_attention(number))
        image = image + start.again.gate * block.attn2(start.again.attended, rows=own)
    if batch is None or not batch.modules:
        image_out, text_out = _fed(block, image, text, start)
    else:
        image_out, text_out = _fed_by_rows(block, number, image, text, start, batch)
    image = image + of_image.feed_forward_gate * image_out
    if isinstance(of_text, Begun):
        text = bounded(text + of_text.feed_forward_gate * text_out)
    return image, text


def bounded(h: Tensor) -> Tensor:
    """Hidden states that half precision can hold, as diffusers' blocks have it."""
    return h.clip(-65504, 65504) if h.dtype == torch.float16 else h


def _fed(block: Any, image: Tensor, text: Tensor, start: JointBegun) -> Streams:
    """What the feed-forwards of both streams give; the text itself where it has none."""
    image = block.ff(block.norm2(image) * (1 + start.image.scale) + start.image.shift)
    if isinstance(start.text, Begun):
        text = block.ff_context(block.norm2_context(text) * (1 + start.text.scale) + start.text.shift)
    return image, text


def _fed_by_rows(
    block: Any, number: int, image: Tensor, text: Tensor, start: JointBegun, batch: AttentionRows
) -> Streams:
    """The same, computed or remembered: of both streams, text first."""

    def fed(_: AttentionRows, image: Tensor, text: Tensor, *modulations: Tensor) -> Tensor:
        of_image = replace(start.image, scale=modulations[0], shift=modulations[1])
        of_text = start.text
        if isinstance(of_text, Begun):
            of_text = replace(of_text, scale=modulations[2], shift=modulations[3])
        image, text = _fed(block, image, text, JointBegun(of_image, of_text))
        return torch.cat([text, image], dim=1)

    streams = [start.image, *([start.text] if isinstance(start.text, Begun) else [])]
    modulations = [t for stream in streams for t in (stream.scale, stream.shift)]
    out = by_rows(feed_forward(number), batch, (image, text, *modulations), fed)
    return out[:, text.shape[1] :], out[:, : text.shape[1]]


def _at(batch: AttentionRows | None, site: Any) -> AttentionRows | None:
    """The batch for another attention of the block."""
    if batch is None:
        return None
    return replace(batch, site=site if any(touches(row.plan, site) for row in batch.rows) else None, text=(0, 0))
