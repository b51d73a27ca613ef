"""Sorts the rows of a tick by what they do in each self-attention; all indices of a tick go to the device together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.networks.attention import AttentionRows, Group, Where
from models.plan import RowMethod
from models.rows import Row, segments

Positions = tuple[int, ...]


class AttentionGroups:
    """The groups of every block of one forward, built before its first block.

    Blocks in which the same rows do the same share their groups, and equal index lists share one tensor.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        self._rows = rows
        self._device = device
        self._adapters = any(row.lora is not None for row in rows)
        self._methods = any(row.plan.attention is not None for row in rows)
        self._made: dict[tuple[int, int, tuple[RowMethod, ...]], AttentionRows] = {}
        self._uploaded: dict[Positions, Tensor] = {}

    def at(self, block: int, lo: int, hi: int) -> AttentionRows | None:
        """What the attentions of `block` need to know of rows [lo, hi); None where all is plain."""
        if not (self._adapters or self._methods):
            return None
        rows = self._rows[lo:hi]
        methods = tuple(row.plan.method(block) for row in rows)
        special = any(method != "full" for method in methods) or any(self._keeps(row, block) for row in rows)
        key = (lo, hi, methods if special else ())
        if key not in self._made:
            self._made[key] = AttentionRows(rows, segments(rows), self._groups(rows, key[2]))
        return self._made[key]

    @staticmethod
    def _keeps(row: Row, block: int) -> bool:
        return row.wants(("attention", block)) or row.wants(("residual", block))

    def _groups(self, rows: Sequence[Row], methods: tuple[RowMethod, ...]) -> tuple[Group, ...]:
        members: dict[tuple[RowMethod, int], list[int]] = {}
        for i, method in enumerate(methods):
            members.setdefault((method, rows[i].plan.window if method == "window" else 0), []).append(i)
        # Twins come last: their conditional rows must be done.
        ordered = sorted(members.items(), key=lambda item: item[0][0].startswith("twin"))
        return tuple(self._group(rows, key, tuple(positions)) for key, positions in ordered)

    def _group(self, rows: Sequence[Row], key: tuple[RowMethod, int], positions: Positions) -> Group:
        method, window = key
        where = None if len(positions) == len(rows) else self._where(positions)
        if not method.startswith("twin"):
            return Group(method, window, positions, where)
        pairs = {row.owner: i for i, row in enumerate(rows) if row.role == "conditional"}
        sources = tuple(pairs[rows[i].owner] for i in positions)
        return Group(method, window, positions, where, self._where(sources), sources)

    def _where(self, positions: Positions) -> Where:
        first, last = positions[0], positions[-1]
        if positions == tuple(range(first, last + 1)):
            return slice(first, last + 1)
        if positions not in self._uploaded:
            self._uploaded[positions] = self._upload(positions)
        return self._uploaded[positions]

    def _upload(self, positions: Positions) -> Tensor:
        index = torch.tensor(positions)
        if self._device.type == "cuda":
            return index.pin_memory().to(self._device, non_blocking=True)
        return index.to(self._device)
