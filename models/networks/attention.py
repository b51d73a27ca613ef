"""The one attention processor: plain attention, DiTFastAttn's methods and LoRA terms, read off the rows it is given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from models.adapters.lora import Source
from models.networks.window import window_attention
from models.plan import RowMethod
from models.rows import Row, Segment, segments

Where = slice | Tensor
"""Rows of a batch: neighbours as a slice, which copies nothing, others by their positions on the device."""


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that do the same in one self-attention: their positions in the batch, and where these are on the device."""

    method: RowMethod
    window: int
    positions: tuple[int, ...]
    where: Where | None  # None: all rows, nothing to gather
    source: Where | None = None  # twins: where their conditional rows are
    sources: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """What the attentions of one block need to know of the batch."""

    rows: Sequence[Row]
    segments: tuple[Segment, ...]
    groups: tuple[Group, ...] = ()  # self-attention by method, twins last; empty: every row in full, nothing kept


class RowAttention:
    """Scaled dot-product attention as diffusers' `AttnProcessor2_0` computes it, row by row as the plans say.

    `path` is the module's name in the network (the key of its LoRA terms); `block` the transformer block whose
    self-attention this is, or None where no method applies. Instances are read-only.
    """

    def __init__(self, path: str, block: int | None = None) -> None:
        self.path = path
        self.block = block
        self.__dict__["__call__"] = _called  # what diffusers inspects; calls go by the class, as always

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,  # [rows, tokens, dim]
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        rows: AttentionRows | None = None,
    ) -> Tensor:
        if rows is None:
            return self._plain(attn, hidden_states, encoder_hidden_states, attention_mask, ())
        by_row = self._outside_graphs if torch.compiler.is_compiling() else self._by_row
        return by_row(attn, hidden_states, encoder_hidden_states, attention_mask, rows)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _outside_graphs(self, *arguments: Any) -> Tensor:
        return self._by_row(*arguments)

    def _by_row(
        self, attn: Attention, x: Tensor, context: Tensor | None, mask: Tensor | None, rows: AttentionRows
    ) -> Tensor:
        if self.block is None or not rows.groups:
            return self._plain(attn, x, context, mask, rows.segments)
        if len(rows.groups) == 1 and rows.groups[0].method == "full":
            return self._compute(attn, x, rows.rows, rows.groups[0])
        return self._mixed(attn, x, rows)

    def _mixed(self, attn: Attention, x: Tensor, rows: AttentionRows) -> Tensor:
        block = self.block
        assert block is not None  # noqa: S101
        out = torch.empty_like(x)
        for group in rows.groups:
            members = [rows.rows[position] for position in group.positions]
            if group.method == "reuse":
                part = torch.cat([row.memory["attention", block] for row in members])
            elif group.source is not None:
                part = _take(out, group.source)
                for i, (row, source) in enumerate(zip(members, group.sources, strict=True)):
                    row.keep(("attention", block), part[i : i + 1])
                    if row.wants(("residual", block)):
                        row.memory["residual", block] = rows.rows[source].memory["residual", block]
            else:
                gathered = x if group.where is None else _take(x, group.where)
                part = self._compute(attn, gathered, members, group)
            if group.where is None:
                return part
            if isinstance(group.where, slice):
                out[group.where] = part
            else:
                out.index_copy_(0, group.where, part)
        return out

    def _compute(self, attn: Attention, x: Tensor, members: Sequence[Row], group: Group) -> Tensor:
        """Self-attention of gathered rows, full or banded, remembering what their plans want."""
        block = self.block
        assert block is not None  # noqa: S101
        parts = segments(members)
        query, key, value = self._project(attn, x, x, parts)
        if group.method == "window":
            core = window_attention(query, key, value, group.window)
            core = core + torch.cat([row.memory["residual", block] for row in members])
        else:
            core = F.scaled_dot_product_attention(query, key, value)
            for i, row in enumerate(members):
                if row.wants(("residual", block)):
                    band = window_attention(query[i : i + 1], key[i : i + 1], value[i : i + 1], row.plan.window)
                    row.memory["residual", block] = core[i : i + 1] - band
        out = self._out(attn, core, parts)
        for i, row in enumerate(members):
            row.keep(("attention", block), out[i : i + 1])
        return out

    def _plain(
        self, attn: Attention, x: Tensor, context: Tensor | None, mask: Tensor | None, parts: tuple[Segment, ...]
    ) -> Tensor:
        rows, context = x.shape[0], x if context is None else context
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, context.shape[1], rows)
            mask = mask.view(rows, attn.heads, -1, mask.shape[-1])
        query, key, value = self._project(attn, x, context, parts)
        return self._out(attn, F.scaled_dot_product_attention(query, key, value, attn_mask=mask), parts)

    def _project(
        self, attn: Attention, x: Tensor, context: Tensor, parts: tuple[Segment, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = attn.to_q(x), attn.to_k(context), attn.to_v(context)
        if parts:
            outs = {"to_q": query, "to_k": key, "to_v": value}
            self._adapt("hidden", x, outs, parts)
            if context is not x:
                self._adapt("context", context, outs, parts)
        heads = (attn.heads, query.shape[-1] // attn.heads)
        query, key, value = (t.view(*t.shape[:-1], *heads).transpose(1, 2) for t in (query, key, value))
        return query, key, value  # [rows, heads, tokens, dim]

    def _out(self, attn: Attention, core: Tensor, parts: tuple[Segment, ...]) -> Tensor:
        x = core.transpose(1, 2).flatten(2)
        out: Tensor = attn.to_out[0](x)
        self._adapt("core", x, {"to_out.0": out}, parts)
        return out

    def _adapt(self, source: Source, x: Tensor, outs: Mapping[str, Tensor], parts: tuple[Segment, ...]) -> None:
        """Add the adapters' terms of x to the projections that read it, in place."""
        for part in parts:
            if (term := part.lora.terms.get((self.path, source))) is not None:
                inner = F.linear(part.of(x), term.down).flatten(0, 1)  # [tokens, ranks]
                for (name, up), h in zip(term.ups, inner.split_with_sizes(term.ranks, dim=1), strict=True):
                    out = part.of(outs[name]).view(-1, up.shape[1])
                    torch.addmm(out, h, up, out=out)  # not addmm_, which flop counters do not know


def _take(x: Tensor, where: Where) -> Tensor:
    return x[where] if isinstance(where, slice) else x.index_select(0, where)


def _called() -> None:
    """Stands for the bound `__call__` when diffusers asks, at every call, which arguments it takes."""


# Asked of a bound method, the answer is worked out anew each time (15 us, of which a tick has dozens).
_called.__signature__ = inspect.signature(RowAttention.__call__.__get__(object()))  # type: ignore[attr-defined]


def install(network: nn.Module, blocks: Sequence[nn.Module] = ()) -> None:
    """Give every attention of a freshly loaded network its processor; `blocks` are those of a DiT."""
    numbers = {block.attn1: number for number, block in enumerate(blocks)}
    for path, module in network.named_modules():
        if isinstance(module, Attention):
            _check_supported(path, module)
            module.set_processor(RowAttention(path, numbers.get(module)))


def _check_supported(path: str, module: Attention) -> None:
    plain = (module.group_norm, module.spatial_norm, module.norm_cross, module.norm_q, module.norm_k)
    if any(part is not None for part in plain) or module.residual_connection or module.rescale_output_factor != 1.0:
        from models.errors import ModelLoadError

        raise ModelLoadError(f"{path}: an attention of this kind is not supported")
