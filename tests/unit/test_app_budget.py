"""What images remember, and who may start: arithmetic of the budget, and of the admission of one tick."""

from __future__ import annotations

import pytest

from app.engine.budget import Budget


@pytest.mark.parametrize(
    ("limit", "reserved", "needs", "expected"),
    [
        (100, 0, [60, 40], "11"),  # exactly all there is
        (100, 0, [60, 41, 40], "100"),  # one byte too much, and nobody passes who waits
        (100, 0, [60, 0, 41, 0], "1101"),  # who needs nothing passes even when it is closed
        (100, 99, [1, 1], "10"),
        (100, 100, [1], "0"),
        (100, 150, [0, 1], "10"),  # more is held than there is: kinds turned out larger than they were known
        (100, 0, [101, 1], "10"),
        (100, 0, [100, 1], "10"),
        (100, 0, [99, 1, 1], "110"),
        (100, 0, [0, 101], "11"),  # nobody holds anything yet
        (100, 50, [51, 10], "00"),
    ],
)
def test_who_may_start_in_one_tick(limit: int, reserved: int, needs: list[int], expected: str) -> None:
    budget = Budget(limit)
    budget.reserved = reserved
    admission = budget.admission()
    assert "".join(str(int(admission.admit(need))) for need in needs) == expected


def test_every_tick_has_a_door_of_its_own() -> None:
    budget = Budget(100)
    budget.reserved = 50
    assert not budget.admission().admit(60)
    assert budget.admission().admit(50)
    budget.reserved = 0
    assert budget.admission().admit(60)
