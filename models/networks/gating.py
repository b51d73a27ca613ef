"""The gates of one forward: probes are compared on the device, and all gates decide after one copy to the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.device import download
from models.reuse.gates import Change
from models.reuse.plans import Gating, Reading, Recall
from models.reuse.rows import Places, Row
from models.reuse.store import FeatureStore
from models.reuse.turns import Turn, replaced, settled


class Gates:
    """Which rows of a forward have gates, and which of them are still open.

    A network offers the probes of gated rows as these come to their sites. When the last open row's is there, all
    decide at once, and every row has the plan that it follows from then on. Rows whose step leaves no choice, and rows
    whose turn was decided before (a forward that failed and is tried again), are settled from the start.
    """

    def __init__(self, rows: Sequence[Row], store: FeatureStore, places: Places) -> None:
        self._store, self._places = store, places
        self._gated: dict[Row, tuple[Gating, Turn]] = {
            row: (row.plan.gating, row.turn) for row in rows if row.plan.gating is not None and row.turn is not None
        }
        for gating, turn in self._gated.values():
            if gating.forced and turn.skip is None:
                turn.force(gating)
        self._waiting = {row for row, (_, turn) in self._gated.items() if turn.skip is None}
        self._probes: list[tuple[Sequence[Row], Tensor]] = []
        self._changes: list[tuple[Sequence[Row], Tensor]] = []
        for row in self._gated.keys() - self._waiting:
            self._settle(row)

    def starts(self) -> set[int]:
        """Where the gated sites begin."""
        return {gating.site.start for gating, _ in self._gated.values()}

    def of(self, row: Row) -> Gating:
        """A gated row's part in its gate."""
        return self._gated[row][0]

    def at(self, rows: Sequence[Row], start: int) -> list[int]:
        """The positions of those of the rows whose gated sites begin here."""
        return [i for i, row in enumerate(rows) if row in self._gated and self.of(row).site.start == start]

    def open(self, row: Row) -> bool:
        """Whether it is undecided what this row does."""
        return row in self._waiting

    def offer(self, rows: Sequence[Row], probe: Tensor) -> None:
        """The probes [rows, ...] of gated rows, at their sites."""
        self._probes.append((rows, probe))
        asking = [i for i, row in enumerate(rows) if row in self._waiting]
        if asking:
            asked = [rows[i] for i in asking]
            self._changes.append((asked, self._compared(asked, self._places.take(probe, asking))))
        if self._waiting <= {row for asked, _ in self._changes for row in asked}:
            self._decide()

    def _compared(self, rows: Sequence[Row], probe: Tensor) -> Tensor:
        """How far each row's probe went, and where it came from, [2, rows]."""
        before = self._store.read([(row.memory, Reading(Recall(), (self.of(row).probe,), (1.0,))) for row in rows])
        exact = torch.promote_types(probe.dtype, torch.float32)
        measured = ((probe - before).flatten(1), before.flatten(1))
        return torch.stack([t.abs().mean(dim=1, dtype=exact) for t in measured])

    def _decide(self) -> None:
        if self._changes:
            numbers = download(torch.cat([measured for _, measured in self._changes], dim=1))  # [2][rows]
            rows = [row for asked, _ in self._changes for row in asked]
            changes: dict[Turn, list[Change]] = {}
            for row, moved, size in zip(rows, *numbers, strict=True):
                changes.setdefault(self._gated[row][1], []).append(Change(moved, size))
            for row in rows:
                gating, turn = self._gated[row]
                if turn.skip is None:
                    turn.ask(gating, changes[turn])
                self._settle(row)
            self._waiting.clear()
            self._changes.clear()
        for asked, probe in self._probes:
            self._remember(asked, probe)
        self._probes.clear()

    def _settle(self, row: Row) -> None:
        gating, turn = self._gated[row]
        row.plan = settled(row.plan, turn)
        row.memory.forget(replaced(gating, turn, list(row.memory.slots)))

    def _remember(self, rows: Sequence[Row], probe: Tensor) -> None:
        """Keep the probes that later ones are compared with."""
        keepers = [i for i, row in enumerate(rows) if _refreshes(*self._gated[row])]
        if keepers:
            entries = [(rows[i].memory, self.of(rows[i]).probe) for i in keepers]
            self._store.write(entries, self._places.take(probe, keepers))


def _refreshes(gating: Gating, turn: Turn) -> bool:
    return not gating.last and (not turn.skip or gating.gated.rule.refresh == "always")


def gates_of(rows: Sequence[Row], store: FeatureStore, places: Places) -> Gates | None:
    """The gates of a forward; None, at no cost, where no row has one."""
    if not any(row.turn is not None for row in rows):
        return None
    gates = Gates(rows, store, places)
    return gates if gates.starts() else None
