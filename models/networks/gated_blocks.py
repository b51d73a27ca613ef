"""Transformer blocks for rows of which some have gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

from torch import Tensor

from models.networks.gating import Gates
from models.reuse.gates import Probe
from models.reuse.rows import Places, Row
from models.reuse.sites import Feature
from models.reuse.store import FeatureStore


@dataclass(frozen=True, slots=True)
class BlockInputs:
    """What blocks take beside the hidden states: tensors [rows, ...] by name, and what all rows of a forward share."""

    rows: dict[str, Tensor | None]
    shared: Any = None

    def take(self, places: Places, positions: Sequence[int]) -> BlockInputs:
        """Those of these rows."""
        rows = {name: None if value is None else places.take(value, positions) for name, value in self.rows.items()}
        return BlockInputs(rows, self.shared)


class Blocks(Protocol):
    """A network that runs a span of its blocks."""

    @property
    def depth(self) -> int:
        """Number of blocks."""

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
        """Hidden states h [rows, tokens, dim] after blocks [start, stop) of the span."""

    def modulated(self, number: int, h: Tensor, inputs: BlockInputs) -> Tensor:
        """What the attention of block `number` sees of hidden states h [rows, tokens, dim]: normalised, modulated."""

    def under(self, rows: Sequence[Row]) -> Blocks:
        """The network as these rows run it."""

    def probed(self, h: Tensor, inputs: BlockInputs) -> Tensor:
        """What of hidden states a gate looks at."""


@dataclass(eq=False, slots=True)
class _Part:
    """The rows that stop at one place until the gates have decided."""

    start: int
    members: list[int]  # their positions in the batch
    h: Tensor
    inputs: BlockInputs
    rows: list[Row]
    begun: dict[Feature, Tensor] = field(default_factory=dict)


def run_gated(
    network: Blocks,
    h: Tensor,
    inputs: BlockInputs,
    rows: Sequence[Row],
    store: FeatureStore,
    places: Places,
    gates: Gates,
) -> Tensor:
    """All blocks for hidden states h [rows, tokens, dim].

    Gated rows that stop at different blocks run apart, so that one copy to the host serves all of them; rows without a
    gate go with the last.
    """
    parts = _parts(h, inputs, rows, places, gates)
    for part in parts:
        _run_to_gate(network, part, store, places, gates)
    for part in parts:
        span = (part.start, network.depth)
        part.h = network.run_blocks(span, part.h, part.inputs, part.rows, store, places, part.begun)
    return places.joined([part.h for part in parts], [part.members for part in parts])


def _parts(h: Tensor, inputs: BlockInputs, rows: Sequence[Row], places: Places, gates: Gates) -> list[_Part]:
    starts = sorted(gates.starts())
    apart = [gates.at(rows, start) for start in starts[:-1]]
    taken = {i for members in apart for i in members}
    apart.append([i for i in range(len(rows)) if i not in taken])
    return [
        _Part(
            start,
            members,
            places.take(h, members),
            inputs.take(places, members),
            [rows[i] for i in members],
        )
        for start, members in zip(starts, apart, strict=True)
    ]


def _run_to_gate(network: Blocks, part: _Part, store: FeatureStore, places: Places, gates: Gates) -> None:
    """Everything in front of the gate, and its probes."""
    by_probe: dict[Probe, list[int]] = {}
    for i in gates.at(part.rows, part.start):
        by_probe.setdefault(gates.of(part.rows[i]).gated.rule.probe, []).append(i)
    edges = [0, part.start - 1, part.start] if "residual" in by_probe else [0, part.start]
    before = part.h
    for span in pairwise(edges):
        before = part.h
        if span[0] < span[1]:
            part.h = network.run_blocks(span, part.h, part.inputs, part.rows, store, places, part.begun)
    for kind, members in by_probe.items():
        probe = places.take(part.h, members)
        if kind == "residual":
            probe = probe - places.take(before, members)
        elif kind == "modulated":
            asked = [part.rows[i] for i in members]
            probe = network.under(asked).modulated(part.start, probe, part.inputs.take(places, members))
        if kind != "modulated":
            probe = network.probed(probe, part.inputs)
        gates.offer([part.rows[i] for i in members], probe)
