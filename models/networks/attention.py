"""The one attention processor: plain attention, DiTFastAttn's methods and LoRA terms, read off the rows it is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from models.adapters.lora import Source
from models.adapters.low_rank import add_terms
from models.errors import ModelLoadError
from models.networks.window import window_attention
from models.reuse.plans import Reading, Recall, Twin, Window
from models.reuse.rows import Places, Row, Segment, keep, put, segments
from models.reuse.sites import Feature, Site, Span
from models.reuse.store import FeatureStore


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """What the attentions of one block need to know of the batch. `site` is its self-attention's, where any row
    reuses or remembers it; `modules` says whether any does so with another module of the block. `text` are the tokens
    [start, stop) of a stream that are text."""

    rows: Sequence[Row]
    segments: tuple[Segment, ...]
    site: Site | None = None
    store: FeatureStore | None = None
    places: Places | None = None
    modules: bool = False
    text: Span = (0, 0)

    def of(self, positions: Sequence[int]) -> AttentionRows:
        """The same of these rows."""
        if len(positions) == len(self.rows):
            return self
        rows = [self.rows[i] for i in positions]
        return replace(self, rows=rows, segments=segments(rows))


Given = tuple[Tensor | None, ...]
"""What an attention is given of each row [rows, ...]."""


@dataclass(frozen=True, slots=True)
class Heads:
    """What attends: query, key and value [rows, heads, tokens, head_dim], and a mask [rows, 1 or heads, 1, tokens].

    `text` are the tokens [start, stop) of a text stream that was given apart; `beside` is what a fused projection gives
    beside the heads.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    text: Span | None = None
    beside: Tensor | None = None

    def full(self) -> Tensor:
        """The core [rows, heads, tokens, head_dim] of everything attending to everything."""
        return F.scaled_dot_product_attention(self.query, self.key, self.value, attn_mask=self.mask)

    def banded(self, width: int, text: Span) -> Tensor:
        """The core with image tokens in a band; `text` are the tokens that are text where no stream was apart."""
        return window_attention(self.query, self.key, self.value, width, self.text or text, self.mask)


class RowAttention:
    """Scaled dot-product attention as diffusers' `AttnProcessor2_0` computes it, row by row as the plans say.

    `path` is the module's name in the network (the key of its LoRA terms); `reusable` says whether this is an attention
    that rows may reuse. Subclasses project otherwise. Instances are read-only.
    """

    adapts = True
    """Whether it adds adapters' terms to its projections itself."""

    def __init__(self, path: str, reusable: bool = False) -> None:
        self.path = path
        self.reusable = reusable
        # What diffusers inspects; calls go by the class, as always.
        self.__dict__["__call__"] = _called(type(self))

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,  # [rows, tokens, dim]
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        rows: AttentionRows | None = None,
    ) -> Tensor:
        return self.run(attn, (hidden_states, encoder_hidden_states, attention_mask), None, rows)

    def run(self, attn: Any, given: Given, shared: Any, rows: AttentionRows | None) -> Tensor:
        """The result [rows, tokens, dim]; `shared` is what all rows have in common."""
        if rows is None:
            return self._whole(attn, given, shared, ())
        by_row = self._outside_graphs if torch.compiler.is_compiling() else self._by_row
        return by_row(attn, given, shared, rows)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _outside_graphs(self, *arguments: Any) -> Tensor:
        return self._by_row(*arguments)

    def _by_row(self, attn: Any, given: Given, shared: Any, rows: AttentionRows) -> Tensor:
        if not self.reusable or rows.site is None or rows.store is None or rows.places is None:
            return self._whole(attn, given, shared, rows.segments)
        return _Reused(self, attn, given, shared, rows, rows.site, rows.store, rows.places).run()

    def _whole(self, attn: Any, given: Given, shared: Any, parts: tuple[Segment, ...]) -> Tensor:
        heads = self.project(attn, given, shared, parts)
        return self.out(attn, heads.full(), heads, parts)

    def project(self, attn: Any, given: Given, shared: Any, parts: tuple[Segment, ...]) -> Heads:
        """What attends, of what is given of the rows."""
        x, context, mask = given
        assert x is not None  # noqa: S101
        context = x if context is None else context
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, context.shape[1], len(x))
            mask = mask.view(len(x), attn.heads, -1, mask.shape[-1])
        query, key, value = attn.to_q(x), attn.to_k(context), attn.to_v(context)
        if parts:
            outs = {"to_q": query, "to_k": key, "to_v": value}
            self._adapt("hidden", x, outs, parts)
            if context is not x:
                self._adapt("context", context, outs, parts)
        split = (attn.heads, query.shape[-1] // attn.heads)
        query, key, value = (t.view(*t.shape[:-1], *split).transpose(1, 2) for t in (query, key, value))
        return Heads(query, key, value, mask)

    def out(self, attn: Any, core: Tensor, heads: Heads, parts: tuple[Segment, ...]) -> Tensor:
        """The result [rows, tokens, dim] of a core [rows, heads, tokens, head_dim]."""
        x = core.transpose(1, 2).flatten(2)
        out: Tensor = attn.to_out[0](x)
        self._adapt("core", x, {"to_out.0": out}, parts)
        return out

    def _adapt(self, source: Source, x: Tensor, outs: Mapping[str, Tensor], parts: tuple[Segment, ...]) -> None:
        """Add the adapters' terms of x to the projections that read it, in place."""
        key = (self.path, source)
        for part in parts:
            found = [[(one.lora.terms[key], one) for one in g if key in one.lora.terms] for g in part.groups]
            add_terms({name: part.of(out) for name, out in outs.items()}, part.of(x), found)


@dataclass(frozen=True, slots=True)
class _Reused:
    """One attention over rows that do different things, a group of equals at a time."""

    processor: RowAttention
    attn: Any
    given: Given
    shared: Any
    batch: AttentionRows
    site: Site
    store: FeatureStore
    places: Places

    @property
    def rows(self) -> Sequence[Row]:
        return self.batch.rows

    def run(self) -> Tensor:
        groups: dict[tuple[str, int], list[int]] = {}
        for i, row in enumerate(self.rows):
            groups.setdefault(_kind(row.plan.reads.get(self.site)), []).append(i)
        if len(groups) == 1:
            [((kind, width), members)] = groups.items()
            return self._group(kind, width, members)
        out: Tensor | None = None
        for (kind, width), members in sorted(groups.items(), key=lambda group: group[0][0] == "twin"):
            # Twins come last: their conditional rows must be done.
            part = self._twins(out, members) if kind == "twin" else self._group(kind, width, members)
            out = part.new_empty(len(self.rows), *part.shape[1:]) if out is None else out
            put(out, self.places.where(members), part)
        assert out is not None  # noqa: S101
        return out

    def _group(self, kind: str, width: int, members: Sequence[int]) -> Tensor:
        rows = [self.rows[i] for i in members]
        if kind == "recall":
            return self.store.read([(row.memory, row.plan.reads[self.site]) for row in rows])
        parts = segments(rows)
        given = tuple(None if t is None else self.places.take(t, members) for t in self.given)
        heads = self.processor.project(self.attn, given, self.shared, parts)
        if kind == "window":
            residual = self.store.read([(row.memory, row.plan.reads[self.site]) for row in rows])
            core = heads.banded(width, self.batch.text) + residual
        else:
            core = heads.full()
            self._keep_residuals(rows, heads, core)
        out = self.processor.out(self.attn, core, heads, parts)
        keep(self.store, self.places, rows, Feature(self.site, "value"), out)
        return out

    def _keep_residuals(self, rows: Sequence[Row], heads: Heads, core: Tensor) -> None:
        """Remember full minus banded attention, for all rows that want the same band at once."""
        for feature in self._residuals(rows):
            wanting = [i for i, row in enumerate(rows) if feature in row.plan.keep]
            query, key, value = (self.places.take(t, wanting) for t in (heads.query, heads.key, heads.value))
            mask = None if heads.mask is None else self.places.take(heads.mask, wanting)
            some = Heads(query, key, value, mask, heads.text)
            residual = self.places.take(core, wanting) - some.banded(feature.width, self.batch.text)
            self.store.write([(rows[i].memory, (feature, rows[i].plan.step)) for i in wanting], residual)

    def _residuals(self, rows: Sequence[Row]) -> list[Feature]:
        found = (f for row in rows for f in row.plan.keep if f.site == self.site and f.kind == "residual")
        return list(dict.fromkeys(found))

    def _twins(self, out: Tensor | None, members: Sequence[int]) -> Tensor:
        """The conditional rows' results for their twins, and their residuals where a twin will want one."""
        assert out is not None  # noqa: S101
        conditional = {row.owner: i for i, row in enumerate(self.rows) if row.role == "conditional"}
        rows = [self.rows[i] for i in members]
        part = self.places.take(out, [conditional[row.owner] for row in rows])
        keep(self.store, self.places, rows, Feature(self.site, "value"), part)
        for feature in self._residuals(rows):
            wanting = [row for row in rows if feature in row.plan.keep]
            step = [(self.rows[conditional[row.owner]], row.plan.step) for row in wanting]
            of_pair = [(one.memory, Reading(Recall(), ((feature, at),), (1.0,))) for one, at in step]
            entries = [(row.memory, (feature, row.plan.step)) for row in wanting]
            self.store.write(entries, self.store.read(of_pair))
        return part


def _kind(reading: Reading | None) -> tuple[str, int]:
    """What rows of one group have in common: how they get their attention, and the half width of the band."""
    match reading:
        case None:
            return "full", 0
        case Reading(reuse=Recall()):
            return "recall", 0
        case Reading(reuse=Window(width=width)):
            return "window", width
        case Reading(reuse=Twin()):
            return "twin", 0
    raise ValueError(f"an attention cannot do {reading.reuse.name}")


def _called(cls: type[RowAttention]) -> Callable[[], None]:
    """Stands for the bound `__call__` when diffusers asks, at every call, which arguments it takes.

    Asked of a bound method, the answer is worked out anew each time (15 us, of which a tick has dozens).
    """

    def called() -> None: ...

    called.__signature__ = inspect.signature(cls.__call__.__get__(object()))  # type: ignore[attr-defined]
    return called


def install(network: nn.Module, reusable: Sequence[nn.Module] = ()) -> None:
    """Give every attention of a freshly loaded network its processor; `reusable` are those that are sites."""
    sites = set(reusable)
    for path, module in network.named_modules():
        if isinstance(module, Attention):
            _check_supported(path, module)
            module.set_processor(RowAttention(path, module in sites))


def _check_supported(path: str, module: Attention) -> None:
    plain = (module.group_norm, module.spatial_norm, module.norm_cross, module.norm_q, module.norm_k)
    if any(part is not None for part in plain) or module.residual_connection or module.rescale_output_factor != 1.0:
        raise ModelLoadError(f"{path}: an attention of this kind is not supported")
