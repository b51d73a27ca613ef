"""Which steps to compute, from what a plain run predicted: linear algebra on inner products, no forward.

Schedulers are linear (`models.solvers.tables`) and so are forecasts (`models.reuse.weights`). Along a fixed path the
last latents of any run are therefore a weighted sum of the first latents and of the predictions that were computed, and
what it is off by follows from inner products of these alone. How a network answers where the path drifts is not known:
masks found here are proposals, to be verified by real runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from models.reuse.weights import BASES, Basis
from models.solvers.names import NoiseSchedule
from models.solvers.tables import Table, table

Mask = tuple[int, ...]
"""The computed steps of a run, rising from 0."""
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Path:
    """Inner products along recorded runs, averaged over pictures and numbers of the latents.

    `gram` [steps + 2, steps + 2] is of the predictions at `times` (noisy first), then the first and the last latents.
    """

    times: Array
    gram: Array

    def places(self, times: Sequence[float]) -> list[int]:
        """The recorded prediction nearest to each time."""
        return [int(np.abs(self.times - time).argmin()) for time in times]


def influence(table: Table) -> tuple[float, Array]:
    """How much of the first latents, and of each prediction [steps], makes the last latents of a run."""
    coefficients: Array = table.coefficients.numpy()
    size = table.registers
    row = np.eye(size)[0]
    weights = np.zeros(len(table))
    for step in reversed(range(len(table))):
        weights[step] = row @ coefficients[step, :, size]
        row = row @ coefficients[step, :, :size]
    return float(row[0]), weights


class Grid:
    """One scheduler's run of some steps beside a recorded one, under forecasts of one order and basis.

    What a run is off by is counted along the recorded path: a prediction is the recorded one of its time.
    """

    def __init__(self, schedule: NoiseSchedule, path: Path, order: int, basis: Basis = "newton") -> None:
        self.table, self.order = table(schedule), order
        self.steps = len(self.table)
        places = path.places(schedule.times)
        self._inner = path.gram[np.ix_(places, places)]
        self.weights = influence(self.table)[1]
        self._bases = lru_cache(maxsize=None)(lambda steps, at: np.array(BASES[basis](steps, at)))

    def local(self, history: Mask, end: int) -> float:
        """The squared errors of the steps foretold from `history` up to `end`, each by its influence, added up."""
        total, index = 0.0, list(history)
        for step in range(history[0] + 1, end):
            w = self._bases(history, step)
            square = self._inner[step, step] - 2 * w @ self._inner[index, step]
            total += self.weights[step] ** 2 * max(0.0, square + w @ self._inner[np.ix_(index, index)] @ w)
        return total

    def best(self, most: int) -> dict[int, Mask]:
        """The mask of least added-up squared error for each number of computed steps up to `most`.

        Dynamic programme over the last order + 1 computed steps: what a foretold step is off by depends on them alone.
        """
        cost = lru_cache(maxsize=None)(self.local)
        states: dict[Mask, tuple[float, Mask]] = {(0,): (0.0, (0,))}
        found: dict[int, Mask] = {}
        for count in range(1, most + 1):
            found[count] = min((value + cost(h, self.steps), mask) for h, (value, mask) in states.items())[1]
            following: dict[Mask, tuple[float, Mask]] = {}
            for history, (value, mask) in states.items():
                for step in range(history[0] + 1, self.steps):
                    state = (step, *history)[: self.order + 1]
                    new = (value + cost(history, step), (*mask, step))
                    if state not in following or new < following[state]:
                        following[state] = new
            states = following
            if not states:
                break
        return found
