"""What the pace says to the digit: what a row costs, how fast that is forgotten, and which ticks are measured."""

from __future__ import annotations

import pytest

from app.engine.pace import FIRST_GUESS, Pace, measure, pays, retry_after


def test_a_row_costs_what_the_first_tick_cost_by_its_rows() -> None:
    pace = Pace()
    pace.observe("sd", 4, 2.0)
    assert pace.predict([("sd", 1)]) == pytest.approx(0.5)
    assert pace.predict([("sd", 6)]) == pytest.approx(3.0)


def test_a_later_tick_counts_for_a_tenth() -> None:
    pace = Pace()
    pace.observe("sd", 4, 2.0)
    pace.observe("sd", 2, 3.0)
    assert pace.predict([("sd", 1)]) == pytest.approx(0.5 + 0.1 * (1.5 - 0.5))
    pace.observe("sd", 1, 0.1)
    assert pace.predict([("sd", 1)]) == pytest.approx(0.6 + 0.1 * (0.1 - 0.6))


def test_work_of_several_models_is_added_each_at_its_own_pace() -> None:
    pace = Pace()
    pace.observe("sd", 2, 0.5)
    pace.observe("dit", 2, 8.0)
    assert pace.predict([("sd", 4), ("dit", 3), ("sd", 2)]) == pytest.approx(4 * 0.25 + 3 * 4.0 + 2 * 0.25)


def test_a_model_that_was_never_measured_is_guessed() -> None:
    assert FIRST_GUESS == 0.05
    pace = Pace()
    pace.observe("sd", 1, 9.0)
    assert pace.predict([("new", 40)]) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(-1.0, 1), (1.0, 1), (1.001, 2), (41.5, 42), (3599.2, 3600), (3600.0, 3600), (3601.0, 3600)],
)
def test_retry_after_is_rounded_up_and_never_more_than_an_hour(seconds: float, expected: int) -> None:
    assert retry_after(seconds) == expected


@pytest.mark.parametrize(
    ("cost", "most", "budget", "measured"),
    [
        ({2: 1.0, 4: 1.5, 8: 2.0, 16: 3.0}, 16, 100.0, [2, 4, 8, 16]),
        ({2: 1.0, 4: 1.5, 8: 2.0}, 8, 100.0, [2, 4, 8]),  # the most is measured too
        ({2: 1.0, 4: 1.5, 8: 2.0}, 15, 100.0, [2, 4, 8]),
        ({2: 1.0}, 2, 100.0, [2]),
        ({2: 50.0}, 16, 1.0, [2]),  # two rows are measured whatever they cost
        ({2: 2.0, 4: 3.0}, 16, 6.0, [2, 4]),  # 4 rows at the cost of 2: 2 + 4 = 6; 8 at that of 4: 5 + 6 > 6
        ({2: 2.0}, 16, 5.9, [2]),
        ({2: 2.0, 4: 3.0, 8: 5.0}, 16, 15.0, [2, 4, 8]),  # 16 at the cost of 8: 10 + 10 > 15
    ],
)
def test_the_knee_measures_doubles_while_the_next_fits_the_budget(
    cost: dict[int, float], most: int, budget: float, measured: list[int]
) -> None:
    asked: list[int] = []

    def seconds_of(rows: int) -> float:
        asked.append(rows)
        return cost[rows]

    measure(seconds_of, most, budget)
    assert asked[: len(measured)] == measured
    assert set(asked) == set(measured)
    assert len(asked) == len(measured) or sum(cost[rows] for rows in asked) <= budget


def test_numbers_of_rows_are_measured_in_turns_and_the_median_counts() -> None:
    """A neighbour disturbs two whole rounds of five."""
    asked: list[int] = []

    def seconds_of(rows: int) -> float:
        asked.append(rows)
        disturbed = (len(asked) - 1) // 3 in (0, 3)
        return {2: 1.0, 4: 1.2, 8: 2.3}[rows] * (7.0 if disturbed else 1.0)

    costs = measure(seconds_of, most=8, budget=1000.0)
    assert asked == [2, 4, 8] * 5
    assert costs == {2: pytest.approx(0.5), 4: pytest.approx(0.3), 8: pytest.approx(0.2875)}
    assert list(costs) == [2, 4, 8]
    assert pays(costs) == 4


def test_a_tick_that_took_longer_than_one_of_more_rows_was_disturbed() -> None:
    costs = measure({2: 9.0, 4: 1.2, 8: 2.0}.__getitem__, most=8, budget=0.0, rounds=1)
    assert costs == {2: 9.0 / 2}, "two rows are measured whatever they cost"
    costs = measure({2: 9.0, 4: 1.2, 8: 2.0}.__getitem__, most=8, budget=100.0, rounds=1)
    assert costs == {2: pytest.approx(0.6), 4: pytest.approx(0.3), 8: pytest.approx(0.25)}


@pytest.mark.parametrize(("two", "expected"), [(2.09, 2), (2.11, 4)])
def test_the_knee_gives_up_at_most_five_per_cent(two: float, expected: int) -> None:
    assert pays({2: two / 2, 4: 1.0}) == expected
