"""The lines of a forward batch: each row brings its plan, its memory and its adapter; nothing is kept elsewhere."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from models.plan import Key, Role, RowPlan

if TYPE_CHECKING:
    from models.adapters.lora import Lora

Memory = dict[Key, Tensor]
Conditioning = dict[str, Tensor]
"""What a backbone is conditioned on besides time, by the argument's name; each tensor is [1, ...]."""


@dataclass(eq=False, slots=True)
class Row:
    """One row of one forward. `owner` ties a guided pair together; `memory` is the trajectory's, kept across steps."""

    plan: RowPlan
    role: Role
    owner: Hashable
    memory: Memory = field(default_factory=dict)
    lora: Lora | None = None

    def keep(self, key: Key, value: Tensor) -> None:
        """Remember a feature [1, ...] if the plan wants it, in storage of its own: a view would hold the batch."""
        if key in self.plan.keep:
            self.memory[key] = value.clone()

    def wants(self, key: Key) -> bool:
        """Whether the plan remembers this feature at this forward."""
        return key in self.plan.keep


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring rows [start, stop) under one adapter."""

    start: int
    stop: int
    lora: Lora

    def of(self, t: Tensor) -> Tensor:
        """These rows of t [rows, ...]."""
        return t if self.stop - self.start == len(t) else t[self.start : self.stop]


def segments(rows: Sequence[Row]) -> tuple[Segment, ...]:
    """The runs of neighbouring rows that share an adapter; base rows are in none."""
    found: list[Segment] = []
    for i, row in enumerate(rows):
        if row.lora is None:
            continue
        if found and found[-1].stop == i and found[-1].lora is row.lora:
            found[-1] = Segment(found[-1].start, i + 1, row.lora)
        else:
            found.append(Segment(i, i + 1, row.lora))
    return tuple(found)


def memory_bytes(memories: Iterable[Memory]) -> int:
    """Bytes of feature storage held, each storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for m in memories for t in m.values()}
    return sum(storages.values())
