"""Gates: rules that decide, while a request runs, whether it reuses a site. Plain numbers, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, NamedTuple

Probe = Literal["input", "residual", "modulated"]
"""The hidden state that enters a site, that minus what entered the block before the site, or that as the site's first
attention sees it: normalised and modulated by time."""


@dataclass(frozen=True, slots=True)
class Gate:
    """A site is reused while its probe has changed little: the change is less than `threshold`.

    `refresh` says since when the change is counted: the last step that computed the site, or the step before
    ("always"). With `accumulate` the changes since the last computed step add up, each sent through the polynomial of
    `coefficients`, highest power first (TeaCache). The first `warmup` steps are computed, and so is every step that
    follows `max_skips` reused ones. `pair` says how a guided pair measures the change that both its rows go by: the
    larger of the two, or the mean over all elements of both (as diffusers' hook does on a batch of one pair).
    """

    threshold: float
    probe: Probe = "residual"
    refresh: Literal["computed", "always"] = "computed"
    accumulate: bool = False
    coefficients: tuple[float, ...] = (1.0, 0.0)
    warmup: int = 0
    max_skips: int | None = None
    pair: Literal["max", "mean"] = "max"


@dataclass(frozen=True, slots=True)
class GateState:
    """What a gate carries from step to step. `computed` are the steps that can still be read, newest first."""

    accumulated: float = 0.0
    skips: int = 0
    computed: tuple[int, ...] = ()


class Change(NamedTuple):
    """How far one row's probe went, mean|p - p'|, and where it came from, mean|p'|."""

    moved: float
    size: float

    @property
    def relative(self) -> float:
        """The relative change; not a number where there was nothing to change."""
        return self.moved / self.size if self.size else float("nan")


def distance(rule: Gate, rows: Sequence[Change]) -> float:
    """The one number that a row alone, or a guided pair, goes by.

    >>> pair = [Change(1.0, 2.0), Change(1.0, 8.0)]
    >>> distance(Gate(0.1), pair), distance(Gate(0.1, pair="mean"), pair)
    (0.5, 0.2)
    """
    if rule.pair == "mean":
        return Change(sum(row.moved for row in rows), sum(row.size for row in rows)).relative
    relative = [row.relative for row in rows]
    return max(relative) if all(change == change for change in relative) else float("nan")


def decide(rule: Gate, state: GateState, change: float | None) -> tuple[bool, GateState]:
    """Whether the site is skipped, and the state after it; a change of None, or not a number, has it computed.

    >>> [decide(Gate(0.1), GateState(), change)[0] for change in (0.09, 0.1, None)]
    [True, False, False]
    """
    computing = GateState(computed=state.computed)
    if change is None or (rule.max_skips is not None and state.skips >= rule.max_skips):
        return False, computing
    total = state.accumulated + polynomial(rule.coefficients, change) if rule.accumulate else change
    if not total < rule.threshold:
        return False, computing
    return True, GateState(total if rule.accumulate else 0.0, state.skips + 1, state.computed)


def polynomial(coefficients: Sequence[float], x: float) -> float:
    """Its value at x, by Horner's rule; the highest power comes first."""
    return reduce(lambda value, coefficient: value * x + coefficient, coefficients, 0.0)
