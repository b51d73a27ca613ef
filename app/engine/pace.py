"""How fast the device works, learned from the ticks it did: what `Retry-After`, waits and rows caps come from."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from app.engine.rows import Rows

SMOOTHING = 0.1
FIRST_RATIO, FIRST_DEVIATION = 1.2, 0.1
DEVIATIONS = 4
"""Above the mean that a run is expected to take: as TCP's retransmission timer is set (RFC 6298), with its gains."""
MEAN_GAIN, DEVIATION_GAIN = 1 / 8, 1 / 4
FIRST_GUESS = 0.05


class Pace:
    """Seconds that one row of one step takes, by model, and those of ticks by their number of rows: exponential
    averages over measured ticks."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._ticks: dict[str, dict[int, float]] = {}
        self._ratios: dict[str, tuple[float, float]] = {}
        self.rows: dict[str, Rows] = {}
        """How many rows a tick pay, of models for which that is not a setting."""

    def observe(self, model: str, rows: int, seconds: float) -> None:
        """Learn from a tick of `rows` rows that took `seconds`."""
        measured = seconds / rows
        known = self._seconds.get(model, measured)
        self._seconds[model] = known + SMOOTHING * (measured - known)
        self.observe_tick(model, rows, seconds)

    def observe_tick(self, model: str, rows: int, seconds: float) -> None:
        """Learn what a tick of so many rows takes, and nothing of what a row does in general: a trial at start."""
        ticks = self._ticks.get(model, {})
        known = ticks.get(rows, seconds)
        self._ticks[model] = {**ticks, rows: known + SMOOTHING * (seconds - known)}  # read by other threads

    def tick(self, model: str, rows: int) -> float:
        """Seconds that a tick of so many rows will take: on the line between the two measured numbers of rows about it,
        as long as the smallest, or as much longer than the largest as it has rows more."""
        ticks = self._ticks.get(model)
        if not ticks:
            return FIRST_GUESS * rows
        known = sorted(ticks)
        at = bisect_left(known, rows)
        if at == len(known):
            return ticks[known[-1]] * rows / known[-1]
        if at == 0:
            return ticks[known[0]]
        low, high = known[at - 1], known[at]
        return ticks[low] + (ticks[high] - ticks[low]) * (rows - low) / (high - low)

    def observe_run(self, model: str, ratio: float) -> None:
        """Learn from a run that had the device to itself, from its prompt to its picture, how many times longer it took
        than its steps say."""
        mean, deviation = self._ratios.get(model, (FIRST_RATIO, FIRST_DEVIATION))
        deviation += DEVIATION_GAIN * (abs(ratio - mean) - deviation)
        self._ratios[model] = mean + MEAN_GAIN * (ratio - mean), deviation

    def slack(self, model: str) -> float:
        """How many times longer a run will hardly take than its steps say: it is encoded, foretold and decoded, too."""
        mean, deviation = self._ratios.get(model, (FIRST_RATIO, FIRST_DEVIATION))
        return mean + DEVIATIONS * deviation

    def predict(self, work: Iterable[tuple[str, int]]) -> float:
        """Seconds until this much work, as (model, rows over all steps left), is done."""
        return sum(self._seconds.get(model, FIRST_GUESS) * rows for model, rows in work)


def retry_after(seconds: float) -> int:
    """A wait in whole seconds for a client that was refused: at least one, at most an hour."""
    return min(max(math.ceil(seconds), 1), 3600)


def measure(seconds_of: Callable[[int], float], most: int, budget: float, rounds: int = 5) -> dict[int, float]:
    """Seconds that a row costs in ticks of 2, 4, 8 ... rows.

    `seconds_of(rows)` measures a tick. The numbers end at `most` rows, or where the next tick would leave the `budget`
    of seconds. All are measured in turns, up to `rounds` times while the budget lasts, and the median counts: what else
    the machine does for a while hits all alike. A tick that took longer than one of more rows was disturbed, and cannot
    have cost more than that one.
    """
    found: dict[int, list[float]] = {}
    rows, spent = 2, 0.0
    while rows <= most and (not found or spent + 2 * found[rows // 2][0] <= budget):
        found[rows] = [seconds_of(rows)]
        spent += found[rows][0]
        rows *= 2
    for _ in range(rounds - 1):
        for number, times in found.items():
            if spent + times[0] <= budget:
                times.append(seconds_of(number))
                spent += times[-1]
    costs, least = {}, math.inf
    for number in reversed(found):
        least = min(least, statistics.median(found[number]))
        costs[number] = least / number
    return dict(reversed(costs.items()))


def pays(costs: Mapping[int, float], slack: float = 1.05) -> int:
    """The fewest rows that cost at most 5 % more a row than the best."""
    return next(rows for rows, cost in costs.items() if cost <= slack * min(costs.values()))
