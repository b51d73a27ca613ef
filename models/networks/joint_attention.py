"""Attention over text and image tokens together: plain, recalled, and with LoRA terms, as the rows given say."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from models.errors import ModelLoadError
from models.networks.attention import AttentionRows, RowAttention
from models.reuse.rows import Row, Segment, keep, segments
from models.reuse.sites import Feature

Rope = tuple[Tensor, Tensor]
"""Cosines and sines [tokens, head_dim] of rotary positions, text first."""
Streams = tuple[Tensor, Tensor]
"""Image and text tokens [rows, tokens, dim]."""
Compute = Callable[[Sequence[int], tuple[Segment, ...]], Tensor]
"""An attention's result [rows, tokens, dim] for these positions of the batch, under these adapters."""


def by_rows(attention: AttentionRows | None, count: int, compute: Compute) -> Tensor:
    """An attention's result for a batch of `count` rows, of which some may recall theirs and some remember it."""
    if attention is None:
        return compute(range(count), ())
    if attention.site is None or attention.store is None or attention.places is None:
        return compute(range(count), attention.segments)
    rows, places, site = attention.rows, attention.places, attention.site
    recalled = [i for i, row in enumerate(rows) if site in row.plan.reads]
    members: list[Sequence[int]] = []
    parts: list[Tensor] = []
    if computed := [i for i in range(count) if site not in rows[i].plan.reads]:
        running: list[Row] = [rows[i] for i in computed]
        out = compute(computed, segments(running))
        keep(attention.store, places, running, Feature(site, "value"), out)
        members.append(computed)
        parts.append(out)
    if recalled:
        members.append(recalled)
        parts.append(attention.store.read([(rows[i].memory, rows[i].plan.reads[site]) for i in recalled]))
    return places.joined(parts, members)


class JointAttention(RowAttention):
    """As diffusers' processors compute it where text comes first and positions are rotary; without text tokens of its
    own, over one stream. What is remembered is of both streams, text first."""

    text_first = True

    def __init__(self, path: str) -> None:
        super().__init__(path, reusable=True)
        self.__dict__["__call__"] = _stub(type(self))

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rope | None = None,
        rows: AttentionRows | None = None,
    ) -> Tensor | Streams:
        run = self._outside_graphs if torch.compiler.is_compiling() and rows is not None else self._run
        out: Tensor = run(attn, hidden_states, encoder_hidden_states, image_rotary_emb, rows)
        if encoder_hidden_states is None:
            return out
        text = encoder_hidden_states.shape[1]
        return out[:, text:], out[:, :text]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _outside_graphs(self, *arguments: Any) -> Tensor:
        return self._run(*arguments)

    def _run(
        self, attn: Any, image: Tensor, text: Tensor | None, rope: Rope | None, rows: AttentionRows | None
    ) -> Tensor:
        def compute(positions: Sequence[int], parts: tuple[Segment, ...]) -> Tensor:
            x, context = image, text
            if len(positions) < len(image):
                assert rows is not None  # noqa: S101
                assert rows.places is not None  # noqa: S101
                x = rows.places.take(image, positions)
                context = None if text is None else rows.places.take(text, positions)
            return self._both(attn, x, context, rope, parts)

        return by_rows(rows, len(image), compute)

    def _both(
        self, attn: Any, x: Tensor, context: Tensor | None, rope: Rope | None, parts: tuple[Segment, ...]
    ) -> Tensor:
        """Both streams' results, text first, [rows, tokens, dim]."""
        own = self._heads(attn, "hidden", x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), parts)
        if context is None:
            core = self._attend(own, rope)
            if not hasattr(attn, "to_out"):  # the block projects it, beside its MLP
                return core
            alone: Tensor = attn.to_out[0](core)
            self._adapt("core", core, {"to_out.0": alone}, parts)
            return alone
        names = ("add_q_proj", "add_k_proj", "add_v_proj")
        added = self._heads(attn, "context", context, names, ("norm_added_q", "norm_added_k"), parts)
        pairs = zip(added, own, strict=True) if self.text_first else zip(own, added, strict=True)
        core = self._attend([torch.cat(pair, dim=1) for pair in pairs], rope)
        length = context.shape[1]
        if self.text_first:
            text, image = core[:, :length], core[:, length:]
        else:
            image, text = core[:, :-length], core[:, -length:]
        image, text = image.contiguous(), text.contiguous()
        out = attn.to_out[0](image)
        self._adapt("core", image, {"to_out.0": out}, parts)
        if getattr(attn, "to_add_out", None) is None:  # the last block's, of which the text is not wanted
            return torch.cat([text, out], dim=1)
        text_out = attn.to_add_out(text)
        self._adapt("context core", text, {"to_add_out": text_out}, parts)
        return torch.cat([text_out, out], dim=1)

    def _heads(
        self, attn: Any, source: Any, x: Tensor, names: Sequence[str], norms: Sequence[str], parts: tuple[Segment, ...]
    ) -> list[Tensor]:
        """Query, key and value [rows, tokens, heads, head_dim]."""
        outs = {name: getattr(attn, name)(x) for name in names}
        self._adapt(source, x, outs, parts)
        query, key, value = (t.unflatten(-1, (attn.heads, -1)) for t in outs.values())
        norm_q, norm_k = (getattr(attn, name, None) for name in norms)
        return [query if norm_q is None else norm_q(query), key if norm_k is None else norm_k(key), value]

    @staticmethod
    def _attend(qkv: Sequence[Tensor], rope: Rope | None, mask: Tensor | None = None) -> Tensor:
        """The core [rows, tokens, heads * head_dim] of query, key and value [rows, tokens, heads, head_dim]."""
        query, key, value = qkv
        if rope is not None:
            query = apply_rotary_emb(query, rope, sequence_dim=1)
            key = apply_rotary_emb(key, rope, sequence_dim=1)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        core = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return core.transpose(1, 2).flatten(2)


class ImageFirstAttention(JointAttention):
    """The same with the image's tokens first, as diffusers' `JointAttnProcessor2_0` has them."""

    text_first = False


class ImageAttention(JointAttention):
    """Image tokens among themselves, beside a joint attention that is the block's site: computed in every step."""

    def _run(
        self, attn: Any, image: Tensor, text: Tensor | None, rope: Rope | None, rows: AttentionRows | None
    ) -> Tensor:
        return self._both(attn, image, text, rope, () if rows is None else rows.segments)


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
        out = super().__call__(attn, hidden_states, None, attention_mask, image_rotary_emb, rows)
        assert isinstance(out, Tensor)  # noqa: S101
        return out

    def _both(
        self, attn: Any, x: Tensor, context: Tensor | None, rope: Rope | None, parts: tuple[Segment, ...]
    ) -> Tensor:
        projected = attn.to_qkv_mlp_proj(x)
        self._adapt("hidden", x, {"to_qkv_mlp_proj": projected}, parts)
        width = attn.inner_dim
        *qkv, mlp = projected.split([width, width, width, projected.shape[-1] - 3 * width], dim=-1)
        query, key, value = (t.unflatten(-1, (-1, attn.head_dim)) for t in qkv)
        core = self._attend((attn.norm_q(query), attn.norm_k(key), value), rope)
        joined = torch.cat([core, attn.mlp_act_fn(mlp)], dim=-1)
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
        run = self._outside_graphs if torch.compiler.is_compiling() and rows is not None else self._rotated
        out: Tensor = run(attn, hidden_states, attention_mask, freqs_cis, rows)
        return out

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _outside_graphs(self, *arguments: Any) -> Tensor:
        return self._rotated(*arguments)

    def _rotated(
        self, attn: Any, x: Tensor, mask: Tensor | None, rotations: Tensor | None, rows: AttentionRows | None
    ) -> Tensor:
        def compute(positions: Sequence[int], parts: tuple[Segment, ...]) -> Tensor:
            given = [x, rotations, mask]
            if len(positions) < len(x):
                assert rows is not None  # noqa: S101
                assert rows.places is not None  # noqa: S101
                given = [None if t is None else rows.places.take(t, positions) for t in given]
            hidden, turns, seen = given
            assert hidden is not None  # noqa: S101
            assert turns is not None  # noqa: S101
            qkv = self._heads(attn, "hidden", hidden, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), parts)
            qkv = [_rotate(qkv[0], turns), _rotate(qkv[1], turns), qkv[2]]
            core = self._attend(qkv, None, None if seen is None else seen[:, None, None])
            out: Tensor = attn.to_out[0](core)
            self._adapt("core", core, {"to_out.0": out}, parts)
            return out

        return by_rows(rows, len(x), compute)


def _rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Queries or keys [rows, tokens, heads, head_dim], turned; in single precision."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotations.unsqueeze(2)).flatten(3).type_as(x)


def _stub(cls: type[JointAttention]) -> Callable[[], None]:
    """Stands for the bound `__call__` when diffusers asks, at every call, which arguments it takes."""

    def called() -> None: ...

    called.__signature__ = inspect.signature(cls.__call__.__get__(object()))  # type: ignore[attr-defined]
    return called


def install_joint(network: nn.Module, choose: Callable[[str, str], type[JointAttention] | None]) -> None:
    """Give every attention of a freshly loaded network its processor, chosen by its path and diffusers' processor.

    Raises `ModelLoadError` for one that is not understood: for which None is chosen.
    """
    for path, module in network.named_modules():
        if not (isinstance(module, Attention) or hasattr(module, "set_processor")):
            continue
        kind = choose(path, type(module.processor).__name__)
        if kind is None or getattr(module, "fused_projections", False):
            raise ModelLoadError(f"{path}: {type(module.processor).__name__} is not supported")
        module.set_processor(kind(path))
