"""Forecasts as weighted sums: every basis is linear in the remembered values, so its weights are known as numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import factorial, prod
from typing import Literal

Basis = Literal["newton", "taylor", "hermite"]


def newton(steps: Sequence[int], at: int) -> tuple[float, ...]:
    """Weights of the values at `steps`, newest first, in the polynomial through them, read at step `at`.

    Lagrange's form of the interpolating polynomial; one value alone has weight 1, which is plain reuse.
    >>> newton([4], 6), newton([4, 2], 6)
    ((1.0,), (2.0, -1.0))
    """
    return tuple(prod(((at - b) / (a - b) for b in steps if b != a), start=1.0) for a in steps)


def taylor(steps: Sequence[int], at: int) -> tuple[float, ...]:
    """Weights of the values at `steps`, newest first, in TaylorSeer's expansion around the newest, read at step `at`.

    The j-th derivative is a finite difference of the (j - 1)-th at the newest step and at the one before, over their
    distance; it counts (at - newest)^j / j! (Liu et al., 2025, arXiv:2503.06923). With two values it is `newton`.
    """
    return _by_differences(steps, lambda order: (at - steps[0]) ** order)


SCALE = 0.5
"""How far HiCache draws its polynomials together, σ; its authors' choice."""


def hermite(steps: Sequence[int], at: int) -> tuple[float, ...]:
    """As `taylor`, with HiCache's scaled Hermite polynomials σ^j H_j(σ x) in place of the powers x^j.

    H_j are the physicists' (Feng et al., 2025, arXiv:2508.16984). With σ = 0.5 the first is x / 2, so a line is
    followed half as far: this basis trades exactness for forecasts that do not run away.
    >>> hermite([4, 2], 6)
    (1.5, -0.5)
    """
    return _by_differences(steps, lambda order: SCALE**order * _physicists(order, SCALE * (at - steps[0])))


def _physicists(order: int, x: float) -> float:
    """The Hermite polynomial H_order at x: H_0 = 1, H_1 = 2 x, H_(n+1) = 2 x H_n - 2 n H_(n-1)."""
    before, value = 0.0, 1.0
    for n in range(order):
        before, value = value, 2 * x * value - 2 * n * before
    return value


def _by_differences(steps: Sequence[int], basis: Callable[[int], float]) -> tuple[float, ...]:
    """Weights of the sum over j of basis(j) / j! times the j-th finite difference at the newest step."""
    differences = [[float(a == b) for b in range(len(steps))] for a in range(len(steps))]  # of each value, by weights
    weights = [0.0] * len(steps)
    for order in range(len(steps)):
        factor = basis(order) / factorial(order)
        weights = [w + factor * d for w, d in zip(weights, differences[0], strict=True)]
        differences = [
            [(a - b) / (steps[i] - steps[i + 1]) for a, b in zip(newer, older, strict=True)]
            for i, (newer, older) in enumerate(pairwise(differences))
        ]
    return tuple(weights)


BASES: dict[Basis, Callable[[Sequence[int], int], tuple[float, ...]]] = {
    "newton": newton,
    "taylor": taylor,
    "hermite": hermite,
}
