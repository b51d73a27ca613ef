"""Diffusion transformers as lists of blocks: the loop is ours, the block maths is diffusers'.

A row that reuses a range of blocks waits while the others run them, and adds its remembered effect (Δ-DiT). Rows that
reuse the rear are sorted to the front of the batch, rows that reuse the front to its end, so the rows that run a block
are one slice; where ranges leave gaps, they are gathered.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from models.adapters.bound import bound
from models.networks.attention import AttentionRows
from models.networks.gated_blocks import BlockInputs, run_gated
from models.networks.gating import gates_of
from models.networks.modules import touches
from models.networks.sites import MODULES, attention
from models.reuse.plans import RowPlan
from models.reuse.rows import Conditioning, Places, Row, by_adapters, kept, put, segments
from models.reuse.sites import Feature, Site, Sites
from models.reuse.store import FeatureStore

POSITION_BYTES = 64 * 2**20
"""Position tables of other sizes than the native one that are kept on the device, least recently used first to go."""


class Transformer(ABC):
    """Runs the blocks of a transformer row by row as the plans say. Subclasses say what lies around them."""

    def __init__(self, module: Any, blocks: Sequence[nn.Module], reusable: Sequence[nn.Module], sites: Sites) -> None:
        self.module = module
        self.blocks = list(blocks)
        self.reusable = list(reusable)
        self.sites = sites
        names = {id(part): name for name, part in module.named_modules()}
        self.paths = [names[id(block)] for block in blocks]

    @abstractmethod
    def begin(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, rows: Sequence[Row]
    ) -> tuple[Tensor, BlockInputs, Tensor]:
        """From latents x [rows, channels, height, width] at times t [rows]: the hidden states [rows, tokens, dim] in
        front of the first block, what every block takes, and what the head takes."""

    @abstractmethod
    def end(self, h: Tensor, inputs: BlockInputs, embedded: Tensor, size: tuple[int, int]) -> Tensor:
        """From hidden states behind the last block to predictions [rows, channels, height, width] of this size."""

    @abstractmethod
    def block(self, number: int, h: Tensor, inputs: BlockInputs, attention: AttentionRows | None) -> Tensor:
        """One transformer block over hidden states h [rows, tokens, dim]."""

    def modulated(self, number: int, h: Tensor, inputs: BlockInputs) -> Tensor:
        """What the attention of block `number` sees of hidden states h [rows, tokens, dim]: normalised, modulated."""
        raise NotImplementedError(f"{type(self).__name__} has no gate on modulated inputs")

    def probed(self, h: Tensor, inputs: BlockInputs) -> Tensor:
        """See `Blocks`."""
        return h

    def kind(self, block: int) -> Hashable:
        """Equal for blocks that cost the same."""
        return 0

    def under(self, rows: Sequence[Row]) -> Transformer:
        """This network as these rows run it: itself where adapters change attentions alone."""
        if not any(one.lora.layers for row in rows for one in row.adapters):
            return self
        seen = copy.copy(self)
        seen.module = bound(self.module, "", rows)
        seen.blocks = [seen.module.get_submodule(path) for path in self.paths]
        return seen

    @property
    def depth(self) -> int:
        """Number of transformer blocks."""
        return len(self.blocks)

    @torch.inference_mode()
    def forward(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, rows: Sequence[Row], store: FeatureStore
    ) -> Tensor:
        """Predict from latents x [rows, channels, height, width] at times t [rows], in the order given."""
        places = Places(x)
        gates = gates_of(rows, store, places)
        order = sorted(range(len(rows)), key=lambda i: (*_zone(rows[i].plan), by_adapters(rows[i])))
        x, t = places.take(x, order), places.take(t, order)
        conditioning = {name: places.take(value, order) for name, value in conditioning.items()}
        rows = [rows[i] for i in order]
        around = self.under(rows)
        h, inputs, embedded = around.begin(x, t, conditioning, rows)
        if gates is None:
            h = self.run_blocks((0, self.depth), h, inputs, rows, store, places, {})
        else:
            h = run_gated(self, h, inputs, rows, store, places, gates)
        out = around.end(h, inputs, embedded, (x.shape[-2], x.shape[-1]))
        return places.take(out, sorted(range(len(order)), key=order.__getitem__))

    def run_blocks(
        self,
        span: tuple[int, int],
        h: Tensor,
        inputs: BlockInputs,
        rows: Sequence[Row],
        store: FeatureStore,
        places: Places,
        begun: dict[Feature, Tensor],
    ) -> Tensor:
        """The blocks of a span; `begun` has what entered the ranges that are to be remembered and have not ended."""
        ranges = list(kept(rows, "blocks"))
        for start, stop in self._stretches(span, rows, ranges):
            begun |= {feature: h for feature in ranges if feature.site.start == start}
            h = self._stretch(start, stop, h, inputs, rows, store, places)
            for feature in ranges:
                if feature.site.stop == stop:
                    keepers = [i for i, row in enumerate(rows) if feature in row.plan.keep]
                    effect = places.take(h, keepers) - places.take(begun.pop(feature), keepers)
                    store.write([(rows[i].memory, (feature, rows[i].plan.step)) for i in keepers], effect)
        return h

    def _stretches(self, span: tuple[int, int], rows: Sequence[Row], kept: Sequence[Feature]) -> list[tuple[int, int]]:
        """Stretches of blocks within which no row joins, leaves, or begins or ends a range to remember."""
        sites = {site for row in rows for site in row.plan.reads if site.kind == "blocks"}
        sites |= {feature.site for feature in kept}
        edges = {edge for site in sites for edge in (site.start, site.stop or 0) if span[0] < edge < span[1]}
        return list(pairwise(sorted({*span, *edges})))

    def _stretch(
        self,
        start: int,
        stop: int,
        h: Tensor,
        inputs: BlockInputs,
        rows: Sequence[Row],
        store: FeatureStore,
        places: Places,
    ) -> Tensor:
        """Blocks [start, stop) for the rows that run them; the others wait, with their effect added where it begins."""
        reused = [_reused(row.plan, start) for row in rows]
        running = [i for i, site in enumerate(reused) if site is None]
        beginning = [i for i, site in enumerate(reused) if site is not None and site.start == start]
        part = h
        if running:
            part = places.take(h, running)
            given = inputs.take(places, running)
            active = [rows[i] for i in running]
            seen = self.under(active)
            for block in range(start, stop):
                part = seen.block(block, part, given, attention_rows(active, block, store, places))
        if len(running) == len(rows) or not (running or beginning):
            return part
        if len(beginning) == len(rows):
            return h + store.read([(row.memory, row.plan.reads[site]) for row, site in zip(rows, reused, strict=True)])  # type: ignore[index]
        waiting = [i for i, site in enumerate(reused) if site is not None and site.start != start]
        out = torch.empty_like(h)
        if running:
            put(out, places.where(running), part)
        if waiting:
            put(out, places.where(waiting), places.take(h, waiting))
        if beginning:
            effect = store.read([(rows[i].memory, rows[i].plan.reads[reused[i]]) for i in beginning])  # type: ignore[index]
            put(out, places.where(beginning), places.take(h, beginning) + effect)
        return out


def unpatchify(h: Tensor, size: tuple[int, int], patch: int) -> Tensor:
    """Tokens [rows, tokens, patch² * channels], channels last, to [rows, channels, height, width]."""
    height, width = size
    h = h.reshape(-1, height // patch, width // patch, patch, patch, h.shape[-1] // patch**2)
    h = torch.einsum("nhwpqc->nchpwq", h)
    return h.reshape(len(h), -1, height, width)


def _reused(plan: RowPlan, block: int) -> Site | None:
    """The range of blocks around `block` that a row does not run."""
    return next(
        (s for s in plan.reads if s.kind == "blocks" and s.stop is not None and s.start <= block < s.stop), None
    )


def _zone(plan: RowPlan) -> tuple[int, int]:
    """Where a row stands in the batch: rear-reusers, widest first; open gates; full rows; front-reusers."""
    if plan.gating is not None:
        return 0, -1
    site = next((s for s in plan.reads if s.kind == "blocks"), None)
    if site is None or site.stop is None:
        return 0, 0
    return (-1, site.start) if site.start > 0 else (1, site.stop)


def attention_rows(rows: Sequence[Row], block: int, store: FeatureStore, places: Places) -> AttentionRows | None:
    """What the modules of a block need to know of its rows; None where all is plain."""
    site, others = attention(block), [Site(kind, block) for kind in MODULES if kind != "attention"]
    special = any(touches(row.plan, site) for row in rows)
    modules = any(touches(row.plan, other) for other in others for row in rows)
    if special or modules:
        return AttentionRows(rows, segments(rows), site if special else None, store, places, modules)
    return AttentionRows(rows, segments(rows)) if any(row.adapters for row in rows) else None
