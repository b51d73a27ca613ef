"""The lines of a forward batch: each row brings its plan, its memory and its adapters; nothing is kept elsewhere."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.device import upload
from models.reuse.plans import Role, RowPlan
from models.reuse.sites import Feature
from models.reuse.store import FeatureStore, Memory
from models.reuse.turns import Turn

if TYPE_CHECKING:
    from models.adapters.lora import Applied
    from models.networks.control import ControlNet

Conditioning = dict[str, Tensor]
"""What a backbone is conditioned on besides time, by the argument's name; each tensor is [1, ...]."""
Where = slice | Tensor
"""Rows of a batch: neighbours as a slice, which copies nothing, others by their positions on the device."""


@dataclass(frozen=True, eq=False, slots=True)
class RowControl:
    """What steers a row: a network, what it makes of a picture [1, channels, h, w], and how strongly it acts."""

    network: ControlNet
    hint: Tensor
    scale: float


@dataclass(eq=False, slots=True)
class Row:
    """One row of one forward. `owner` ties a guided pair together; `memory` is the trajectory's, kept across steps.

    Where its plan has a gate, `turn` takes the decision, and the network then gives the row the plan that follows.
    """

    plan: RowPlan
    role: Role
    owner: Hashable
    memory: Memory = field(default_factory=Memory)
    adapters: tuple[Applied, ...] = ()
    turn: Turn | None = None
    controls: tuple[RowControl, ...] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring rows [start, stop) under adapters: cut evenly, in their order, into groups that share theirs."""

    start: int
    stop: int
    groups: tuple[tuple[Applied, ...], ...]

    def of(self, t: Tensor) -> Tensor:
        """These rows of t [rows, ...]."""
        return t if self.stop - self.start == len(t) else t[self.start : self.stop]


def segments(rows: Sequence[Row]) -> tuple[Segment, ...]:
    """The runs of neighbouring rows under adapters; base rows are in none."""
    found: list[Segment] = []
    start = 0
    while start < len(rows):
        if not rows[start].adapters:
            start += 1
            continue
        stop = next((i for i in range(start, len(rows)) if not rows[i].adapters), len(rows))
        found.append(_segment([row.adapters for row in rows[start:stop]], start))
        start = stop
    return tuple(found)


def _segment(adapters: Sequence[tuple[Applied, ...]], start: int) -> Segment:
    sizes, groups = [1], [adapters[0]]
    for one in adapters[1:]:
        if len(one) == len(groups[-1]) and all(a.same(b) for a, b in zip(one, groups[-1], strict=True)):
            sizes[-1] += 1
        else:
            sizes.append(1)
            groups.append(one)
    unit = math.gcd(*sizes)
    even = (group for group, size in zip(groups, sizes, strict=True) for _ in range(size // unit))
    return Segment(start, start + len(adapters), tuple(even))


def by_adapters(row: Row) -> tuple[tuple[str, float], ...]:
    """Sorts rows so that those under the same adapters are neighbours, base rows first."""
    return tuple((one.lora.info.name, one.scale) for one in row.adapters)


class Places:
    """Positions of rows as indices, for one forward: equal lists go to the device once."""

    def __init__(self, device: Tensor) -> None:
        self._device = device.device
        self._uploaded: dict[tuple[int, ...], Tensor] = {}

    def where(self, positions: Sequence[int]) -> Where:
        """A slice where the positions are neighbours, else an index on the device."""
        if isinstance(positions, range):
            return slice(positions.start, positions.stop)
        first, last = positions[0], positions[-1]
        if last - first + 1 == len(positions) and all(p == first + i for i, p in enumerate(positions)):
            return slice(first, last + 1)
        key = tuple(positions)
        if key not in self._uploaded:
            self._uploaded[key] = upload(key, self._device)
        return self._uploaded[key]

    def numbers(self, values: Sequence[float]) -> Tensor:
        """Numbers [n] on the device."""
        return upload(values, self._device)

    def take(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        """These rows of x [rows, ...]; x itself where they are all of it, in order."""
        where = self.where(positions)
        if isinstance(where, slice):
            return x if where.start == 0 and where.stop == len(x) else x[where]
        return x.index_select(0, where)

    def joined(self, parts: Sequence[Tensor], members: Sequence[Sequence[int]]) -> Tensor:
        """The rows of several tensors [rows, ...] as one, each in its position; together they are all there are."""
        order = [i for positions in members for i in positions]
        x = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return self.take(x, sorted(range(len(order)), key=order.__getitem__))


def put(x: Tensor, where: Where, values: Tensor) -> None:
    """Write values into these rows of x, in place."""
    if isinstance(where, slice):
        x[where] = values
    else:
        x.index_copy_(0, where, values)


def keep(store: FeatureStore, places: Places, rows: Sequence[Row], feature: Feature, values: Tensor) -> None:
    """Remember a feature [rows, ...] for those of the rows whose plans keep it."""
    keepers = [i for i, row in enumerate(rows) if feature in row.plan.keep]
    if keepers:
        entries = [(rows[i].memory, (feature, rows[i].plan.step)) for i in keepers]
        store.write(entries, places.take(values, keepers))


def kept(rows: Sequence[Row], kind: str) -> Iterator[Feature]:
    """The features on sites of this kind that any of the rows keeps, each once."""
    yield from dict.fromkeys(feature for row in rows for feature in row.plan.keep if feature.site.kind == kind)
