"""Sorts the rows of a tick by what they do in each self-attention; all indices of a tick go to the device together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from models.backbones.attention import AttentionRows, Group
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
        self._index = cache(self._upload)

    def at(self, block: int, lo: int, hi: int) -> AttentionRows | None:
        """What the attentions of `block` need to know of rows [lo, hi); None where all is plain."""
        if not (self._adapters or self._methods):
            return None
        rows = self._rows[lo:hi]
        special = any(row.plan.method(block) != "full" or self._keeps(row, block) for row in rows)
        return AttentionRows(rows, segments(rows), self._groups(rows, block) if special else ())

    @staticmethod
    def _keeps(row: Row, block: int) -> bool:
        return row.wants(("attention", block)) or row.wants(("residual", block))

    def _groups(self, rows: Sequence[Row], block: int) -> tuple[Group, ...]:
        members: dict[tuple[str, int], list[int]] = {}
        for i, row in enumerate(rows):
            method = row.plan.method(block)
            members.setdefault((method, row.plan.window if method == "window" else 0), []).append(i)
        # Twins come last: their conditional rows must be done.
        ordered = sorted(members.items(), key=lambda item: item[0][0].startswith("twin"))
        return tuple(self._group(rows, key, tuple(positions)) for key, positions in ordered)

    def _group(self, rows: Sequence[Row], key: tuple[str, int], positions: Positions) -> Group:
        method, window = key
        index = None if len(positions) == len(rows) else self._index(positions)
        if not method.startswith("twin"):
            return Group(method, window, positions, index)  # type: ignore[arg-type]
        pairs = {row.owner: i for i, row in enumerate(rows) if row.role == "conditional"}
        sources = tuple(pairs[rows[i].owner] for i in positions)
        return Group(method, window, positions, index, self._index(sources), sources)  # type: ignore[arg-type]

    def _upload(self, positions: Positions) -> Tensor:
        index = torch.tensor(positions)
        if self._device.type == "cuda":
            return index.pin_memory().to(self._device, non_blocking=True)
        return index.to(self._device)
