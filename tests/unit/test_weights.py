"""Forecasts as weighted sums: what each basis makes of known functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import factorial

import pytest
from numpy.polynomial.hermite import hermval

from models.reuse.weights import BASES, Basis, hermite, newton, taylor

STEPS = [(9, 7, 6), (4, 2, 0), (3, 2, 1)]


def foretold(weights: Callable[[Sequence[int], int], Sequence[float]], f: Callable[[float], float], *at: int) -> float:
    *steps, step = at
    return sum(w * f(s) for w, s in zip(weights(steps, step), steps, strict=True))


@pytest.mark.parametrize("basis", BASES)
def test_weights_add_up_to_one(basis: Basis) -> None:
    """A value that stands still is foretold to stand still."""
    for steps in STEPS:
        for n in (1, 2, 3):
            weights: list[float] = [*BASES[basis](steps[:n], 12)]
            assert sum(weights) == pytest.approx(1)


@pytest.mark.parametrize("steps", STEPS)
def test_newton_is_the_polynomial_through_the_values(steps: tuple[int, ...]) -> None:
    for f in (lambda s: 3.0, lambda s: 2 - 5 * s, lambda s: 1 + s - 0.5 * s * s):
        assert foretold(newton, f, *steps, 12) == pytest.approx(f(12))
    assert foretold(newton, lambda s: s**3, *steps, 12) != pytest.approx(12**3)


def test_taylor_is_by_finite_differences() -> None:
    """Worked by hand for values 10, 4, 1 at steps 4, 2, 0, read at 5: 10 + 1 * 3 + 1 / 2 * 0.75."""
    values: dict[float, float] = {4: 10.0, 2: 4.0, 0: 1.0}
    assert foretold(taylor, values.__getitem__, 4, 2, 0, 5) == pytest.approx(13.375)
    assert taylor((4,), 5) == (1.0,)
    assert taylor((4, 2), 5) == pytest.approx((1.5, -0.5))
    assert newton((4, 2), 5) == pytest.approx((1.5, -0.5))


def test_hermite_draws_the_terms_together() -> None:
    """Worked by hand for values 10, 4, 1 at steps 4, 2, 0, read at 6: x = 2, so .5 H1(1) = 1 and .25 H2(1) = .5 stand
    for 2 and 4; 10 + 1 * 3 + .5 / 2 * .75. NumPy's Hermite series says the same of a fourth value."""
    values: dict[float, float] = {4: 10.0, 2: 4.0, 0: 1.0, -2: 5.0}
    assert foretold(hermite, values.__getitem__, 4, 2, 0, 6) == pytest.approx(13.1875)
    assert hermite((4,), 6) == (1.0,)
    differences = [10.0, 3.0, 0.75, (0.75 - 1.75) / 2]
    series = [d * 0.5**j / factorial(j) for j, d in enumerate(differences)]
    assert foretold(hermite, values.__getitem__, 4, 2, 0, -2, 7) == pytest.approx(hermval(0.5 * 3, series))
