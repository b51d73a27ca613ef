"""Forecasts as weighted sums: every basis is linear in the remembered values, so its weights are known as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod


def newton(steps: Sequence[int], at: int) -> tuple[float, ...]:
    """Weights of the values at `steps`, newest first, in the polynomial through them, read at step `at`.

    Lagrange's form of the interpolating polynomial; one value alone has weight 1, which is plain reuse.
    >>> newton([4], 6), newton([4, 2], 6)
    ((1.0,), (2.0, -1.0))
    """
    return tuple(prod(((at - b) / (a - b) for b in steps if b != a), start=1.0) for a in steps)
