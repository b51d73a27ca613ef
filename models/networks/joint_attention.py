"""Attention over text and image tokens together: how each kind projects. What rows do with it is `RowAttention`'s."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from models.errors import ModelLoadError
from models.networks.attention import AttentionRows, Given, Heads, RowAttention
from models.reuse.rows import Segment

Rope = tuple[Tensor, Tensor]
"""Cosines and sines [tokens, head_dim] of rotary positions, text first."""
Streams = tuple[Tensor, Tensor]
"""Image and text tokens [rows, tokens, dim]."""
Parts = tuple[Segment, ...]
QKV = ("to_q", "to_k", "to_v")


class JointAttention(RowAttention):
    """As diffusers' processors compute it where text comes first and positions are rotary; without text tokens of its
    own, over one stream. What is remembered is of both streams, text first."""

    text_first = True

    def __init__(self, path: str) -> None:
        super().__init__(path, reusable=True)

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rope | None = None,
        rows: AttentionRows | None = None,
    ) -> Tensor | Streams:
        out = self.run(attn, (hidden_states, encoder_hidden_states), image_rotary_emb, rows)
        if encoder_hidden_states is None:
            return out
        text = encoder_hidden_states.shape[1]
        return out[:, text:], out[:, :text]

    def project(self, attn: Any, given: Given, shared: Any, parts: Parts) -> Heads:
        """See `RowAttention`."""
        x, context = given
        assert x is not None  # noqa: S101
        own = self._heads(attn, "hidden", x, QKV, ("norm_q", "norm_k"), parts)
        if context is None:
            return _turned(own, shared)
        names = ("add_q_proj", "add_k_proj", "add_v_proj")
        added = self._heads(attn, "context", context, names, ("norm_added_q", "norm_added_k"), parts)
        pairs = zip(added, own, strict=True) if self.text_first else zip(own, added, strict=True)
        start = 0 if self.text_first else x.shape[1]
        return _turned([torch.cat(pair, dim=1) for pair in pairs], shared, (start, start + context.shape[1]))

    def out(self, attn: Any, core: Tensor, heads: Heads, parts: Parts) -> Tensor:
        """See `RowAttention`; of both streams, text first."""
        core = core.transpose(1, 2).flatten(2)
        if heads.text is None:
            if not hasattr(attn, "to_out"):  # the block projects it, beside its MLP
                return core
            alone: Tensor = attn.to_out[0](core)
            self._adapt("core", core, {"to_out.0": alone}, parts)
            return alone
        start, stop = heads.text
        text = core[:, start:stop].contiguous()
        image = (core[:, stop:] if start == 0 else core[:, :start]).contiguous()
        out = attn.to_out[0](image)
        self._adapt("core", image, {"to_out.0": out}, parts)
        if getattr(attn, "to_add_out", None) is None:  # the last block's, of which the text is not wanted
            return torch.cat([text, out], dim=1)
        text_out = attn.to_add_out(text)
        self._adapt("context core", text, {"to_add_out": text_out}, parts)
        return torch.cat([text_out, out], dim=1)

    def _heads(
        self, attn: Any, source: Any, x: Tensor, names: Sequence[str], norms: Sequence[str], parts: Parts
    ) -> list[Tensor]:
        """Query, key and value [rows, tokens, heads, head_dim]."""
        outs = {name: getattr(attn, name)(x) for name in names}
        self._adapt(source, x, outs, parts)
        query, key, value = (t.unflatten(-1, (attn.heads, -1)) for t in outs.values())
        norm_q, norm_k = (getattr(attn, name, None) for name in norms)
        return [query if norm_q is None else norm_q(query), key if norm_k is None else norm_k(key), value]


class ImageFirstAttention(JointAttention):
    """The same with the image's tokens first, as diffusers' `JointAttnProcessor2_0` has them."""

    text_first = False


class FusedAttention(JointAttention):
    """Attention beside the block's MLP, with one projection in and one out for both."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rope | None = None,
        rows: AttentionRows | None = None,
    ) -> Tensor:
        return self.run(attn, (hidden_states,), image_rotary_emb, rows)

    def project(self, attn: Any, given: Given, shared: Any, parts: Parts) -> Heads:
        """See `RowAttention`; beside the heads, the MLP's input."""
        x = given[0]
        assert x is not None  # noqa: S101
        projected = attn.to_qkv_mlp_proj(x)
        self._adapt("hidden", x, {"to_qkv_mlp_proj": projected}, parts)
        width = attn.inner_dim
        *qkv, mlp = projected.split([width, width, width, projected.shape[-1] - 3 * width], dim=-1)
        query, key, value = (t.unflatten(-1, (-1, attn.head_dim)) for t in qkv)
        return _turned((attn.norm_q(query), attn.norm_k(key), value), shared, beside=mlp)

    def out(self, attn: Any, core: Tensor, heads: Heads, parts: Parts) -> Tensor:
        """See `RowAttention`."""
        joined = torch.cat([core.transpose(1, 2).flatten(2), attn.mlp_act_fn(heads.beside)], dim=-1)
        out: Tensor = attn.to_out(joined)
        self._adapt("core", joined, {"to_out": out}, parts)
        return out


class ComplexRotaryAttention(JointAttention):
    """One stream under complex rotations [rows, tokens, head_dim / 2] and masks [rows, tokens] of each row."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
        rows: AttentionRows | None = None,
    ) -> Tensor:
        return self.run(attn, (hidden_states, freqs_cis, attention_mask), None, rows)

    def project(self, attn: Any, given: Given, shared: Any, parts: Parts) -> Heads:
        """See `RowAttention`."""
        x, rotations, mask = given
        assert x is not None  # noqa: S101
        assert rotations is not None  # noqa: S101
        query, key, value = self._heads(attn, "hidden", x, QKV, ("norm_q", "norm_k"), parts)
        query, key, value = (t.transpose(1, 2) for t in (_rotate(query, rotations), _rotate(key, rotations), value))
        return Heads(query, key, value, None if mask is None else mask[:, None, None])


def _turned(
    qkv: Sequence[Tensor], rope: Rope | None, text: tuple[int, int] | None = None, beside: Tensor | None = None
) -> Heads:
    """Query, key and value [rows, tokens, heads, head_dim] at their rotary positions."""
    query, key, value = qkv
    if rope is not None:
        query = apply_rotary_emb(query, rope, sequence_dim=1)
        key = apply_rotary_emb(key, rope, sequence_dim=1)
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    return Heads(query, key, value, None, text, beside)


def _rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Queries or keys [rows, tokens, heads, head_dim], turned; in single precision."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotations.unsqueeze(2)).flatten(3).type_as(x)


def install_joint(network: nn.Module, choose: Callable[[str], type[JointAttention] | None]) -> None:
    """Give every attention of a freshly loaded network its processor, chosen by diffusers' processor.

    Raises `ModelLoadError` for one that is not understood: for which None is chosen.
    """
    for path, module in network.named_modules():
        if not (isinstance(module, Attention) or hasattr(module, "set_processor")):
            continue
        kind = choose(type(module.processor).__name__)
        if kind is None or getattr(module, "fused_projections", False):
            raise ModelLoadError(f"{path}: {type(module.processor).__name__} is not supported")
        module.set_processor(kind(path))
