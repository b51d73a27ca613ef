"""Which steps to compute, from what a plain run predicted: linear algebra on inner products, no forward.

Schedulers are linear (`models.solvers.tables`) and so are forecasts (`models.reuse.weights`). Along a fixed path the
last latents of any run are therefore a weighted sum of the first latents and of the predictions that were computed, and
what it is off by follows from inner products of these alone. How a network answers where the path drifts is only
guessed: masks found here are proposals, to be verified by real runs.
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
SPREAD = 0.05
"""Chosen by how well expected errors went with those of 40 real runs of a bundled model (correlation 0.79)."""


@dataclass(frozen=True, eq=False)
class Path:
    """Inner products along recorded runs, averaged over pictures and numbers of the latents.

    `gram` [steps + 2, steps + 2] is of the predictions at `times` (noisy first), then the first and the last latents.
    `samples` [steps, steps + 2] are the latents ahead of each step, in weights of these.
    """

    times: Array
    gram: Array
    samples: Array

    def places(self, times: Sequence[float]) -> list[int]:
        """The recorded prediction nearest to each time."""
        return [int(np.abs(self.times - time).argmin()) for time in times]


def samples(table: Table) -> Array:
    """The latents ahead of each step of a plain run, in weights of its predictions, first and last latents."""
    coefficients, size, steps = table.coefficients.numpy(), table.registers, len(table)
    state, found = np.zeros((size, steps + 2)), np.zeros((steps, steps + 2))
    state[0, -2] = 1.0
    for step in range(steps):
        found[step] = state[0]
        state = coefficients[step, :, :size] @ state
        state[:, step] += coefficients[step, :, size]
    return found


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


def gains(schedule: NoiseSchedule, spread: float = SPREAD) -> Array:
    """How a prediction answers to a sample that is off its path, by step [steps], were the data Gaussian.

    `spread` is the variance of what a caption leaves open. Zeros, no answer at all, where the scheduler's samples are
    not signal and noise of unit variance together.
    """
    scheduler = schedule.scheduler
    kind = scheduler.config.get("prediction_type")
    if kind not in ("epsilon", "v_prediction") or float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0:
        return np.zeros(len(schedule.times))
    signal = np.array([float(scheduler.alphas_cumprod[round(time)]) ** 0.5 for time in schedule.times])
    noise = np.maximum((1 - signal**2) ** 0.5, 1e-3)
    clean = signal * spread / (signal**2 * spread + noise**2)  # of the data foreseen, by the sample
    found: Array = (1 - signal * clean) / noise if kind == "epsilon" else (signal - clean) / noise
    return found


class Grid:
    """One scheduler's run of some steps beside a recorded one, under forecasts of one order and basis.

    All is counted in weights of the recorded predictions and of the first and last latents, whose inner products are
    known. A computed prediction is the recorded one of its time, and what the sample's distance from the path adds.
    """

    def __init__(self, schedule: NoiseSchedule, path: Path, order: int, basis: Basis = "newton") -> None:
        self.table, self.order = table(schedule), order
        self.steps = len(self.table)
        self._coefficients, self._gains = self.table.coefficients.numpy(), gains(schedule)
        self._places = path.places(schedule.times)
        self._path = path
        self._inner = path.gram[np.ix_(self._places, self._places)]
        self.weights = influence(self.table)[1]
        self._bases = lru_cache(maxsize=None)(lambda steps, at: np.array(BASES[basis](steps, at)))

    def error(self, mask: Mask) -> float:
        """The mean square that the last latents are expected to be off the recorded run's."""
        computed, size, width = set(mask), self.table.registers, len(self._path.gram)
        state = np.zeros((size, width))
        state[0, -2] = 1.0
        known: dict[int, Array] = {}
        history: Mask = ()
        for step, numbers in enumerate(self._coefficients):
            if step in computed:
                prediction = self._gains[step] * (state[0] - self._path.samples[self._places[step]])
                prediction[self._places[step]] += 1.0
                known[step] = prediction
                history = (step, *history)[: self.order + 1]
            else:
                prediction = self._bases(history, step) @ np.stack([known[s] for s in history])
            state = numbers[:, :size] @ state + np.outer(numbers[:, size], prediction)
        state[0, -1] -= 1.0
        return max(0.0, float(state[0] @ self._path.gram @ state[0]))

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

    def refined(self, mask: Mask, reach: int = 3) -> Mask:
        """The mask with its computed steps moved, one at a time by up to `reach`, while the expected error falls."""
        best, least = mask, self.error(mask)
        improved = True
        while improved:
            improved = False
            for k in range(1, len(best)):
                for move in (d for d in range(-reach, reach + 1) if d):
                    tried = (*best[:k], best[k] + move, *best[k + 1 :])
                    if tried[k - 1] < tried[k] < (*tried, self.steps)[k + 1]:
                        error = self.error(tried)
                        if error < least * (1 - 1e-9):
                            best, least, improved = tried, error, True
        return best
