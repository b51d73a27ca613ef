"""A block over one stream of image and text tokens, scaled and gated by time; as diffusers computes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.networks.attention import AttentionRows
from models.networks.modules import by_rows
from models.reuse.sites import Site


@dataclass(frozen=True, slots=True)
class Layout:
    """Which tokens are what: the image's come first, `image` of them, then padding; [caption, end) are the prompt's."""

    image: int
    caption: int
    end: int


def modulation(block: Any, time: Tensor | None) -> Sequence[Tensor]:
    """Scale and gate of the attention, and of the feed-forward, [rows, 1, dim]."""
    parts: Sequence[Tensor] = block.adaLN_modulation(time).unsqueeze(1).chunk(4, dim=2)
    return parts


def run_block(
    block: Any,
    h: Tensor,
    attended: Tensor | None,
    positions: Tensor | None,
    time: Tensor | None,
    batch: AttentionRows | None,
    feeding: Site | None = None,
) -> Tensor:
    """The block over h [rows, tokens, dim], normalised before and behind each of its modules, of which any row may take
    a result from memory; `feeding` is its feed-forward where that is a site."""
    options = {"attention_mask": attended, "freqs_cis": positions, "rows": batch}
    if not block.modulation:
        h = h + block.attention_norm2(block.attention(block.attention_norm1(h), **options))
        return h + block.ffn_norm2(block.feed_forward(block.ffn_norm1(h)))  # type: ignore[no-any-return]
    scale, gate, scale_mlp, gate_mlp = modulation(block, time)
    out = block.attention(block.attention_norm1(h) * (1.0 + scale), **options)
    h = h + gate.tanh() * block.attention_norm2(out)

    def fed(_: AttentionRows | None, x: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = block.feed_forward(block.ffn_norm1(x) * (1.0 + scale))
        return out

    out = fed(batch, h, scale_mlp) if feeding is None else by_rows(feeding, batch, (h, scale_mlp), fed)
    return h + gate_mlp.tanh() * block.ffn_norm2(out)  # type: ignore[no-any-return]
