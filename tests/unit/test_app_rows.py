"""Rows a tick while serving: what ticks teach, what did not come up, trials of more, and what a file keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from app.engine.rows import FILE, LEAST_TICKS, MOST_KEPT, REVIEW_TICKS, TRIAL_TICKS, Kept, Rows

COSTS = {2: 0.5, 4: 0.3, 8: 0.29, 16: 0.29}
"""Four rows pay."""


def rows_of(costs: Mapping[int, float] = COSTS) -> tuple[Rows, list[dict[int, float]]]:
    kept: list[dict[int, float]] = []
    return Rows(costs, lambda found: kept.append(dict(found))), kept


def test_it_begins_with_what_the_trials_said() -> None:
    rows, kept = rows_of()
    assert rows.cap == 4
    assert kept == []


def test_ticks_that_say_otherwise_change_it_at_the_review() -> None:
    rows, kept = rows_of()
    for i in range(REVIEW_TICKS):
        assert rows.cap == 4
        number = (2, 4, 8)[i % 3]
        rows.observe(number, number * {2: 0.5, 4: 0.3, 8: 0.2}[number])
    assert rows.cap == 8
    assert kept == [{2: 0.5, 4: pytest.approx(0.3), 8: pytest.approx(0.2), 16: pytest.approx(0.29)}], (
        "16 did not come up"
    )


def test_a_machine_that_is_slower_on_the_whole_changes_nothing() -> None:
    rows, kept = rows_of()
    for _ in range(REVIEW_TICKS):
        rows.observe(4, 4 * 0.9)
    assert kept == [{2: pytest.approx(1.5), 4: pytest.approx(0.9), 8: pytest.approx(0.87), 16: pytest.approx(0.87)}]
    assert rows.cap == 4


def test_a_few_odd_ticks_change_nothing() -> None:
    rows, kept = rows_of()
    for i in range(REVIEW_TICKS):
        if i < LEAST_TICKS - 1:
            rows.observe(8, 8 * 0.001)  # too few of them to tell
        else:
            rows.observe(4, 4 * (9.0 if i % 3 == 0 else 0.3))  # a neighbour, now and then
    assert kept == [COSTS]
    assert rows.cap == 4


def test_rows_between_count_at_the_power_of_two_below() -> None:
    rows, kept = rows_of()
    for i in range(REVIEW_TICKS):
        number = (2, 7, 9)[i % 3]
        rows.observe(number, number * {2: 0.5, 7: 0.4, 9: 0.1}[number])
    assert kept == [{2: 0.5, 4: pytest.approx(0.4), 8: pytest.approx(0.1), 16: pytest.approx(0.29)}]
    assert rows.cap == 8


def test_now_and_then_a_tick_may_have_twice_the_rows() -> None:
    rows, _ = rows_of()
    caps = [rows.observe(4, 1.2) for _ in range(2 * TRIAL_TICKS)]
    assert [i for i, cap in enumerate(caps) if cap == 8] == [TRIAL_TICKS - 1, 2 * TRIAL_TICKS - 1]
    assert set(caps) == {4, 8}
    rows, _ = rows_of()
    assert {rows.observe(2, 1.0) for _ in range(2 * TRIAL_TICKS)} == {4}, "nobody who needs more waits"
    rows, _ = rows_of({2: 0.5, 4: 0.1})
    assert {rows.observe(4, 0.4) for _ in range(2 * TRIAL_TICKS)} == {4}, "never more than was measured"


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    Kept(tmp_path).write("sd on a cpu", COSTS)
    Kept(tmp_path).write("dit on a cpu", {2: 1.0})
    assert Kept(tmp_path).read("sd on a cpu") == COSTS
    assert Kept(tmp_path).read("dit on a cpu") == {2: 1.0}
    assert Kept(tmp_path).read("sd on a gpu") is None
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


def test_without_a_folder_nothing_is_kept() -> None:
    Kept(None).write("x", COSTS)
    assert Kept(None).read("x") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"x": 1}',
        '{"x": {}}',
        '{"x": {"2": -1}}',
        '{"x": {"3": 1}}',
        '{"x": {"2": "y"}}',
        '{"x": {"2": NaN}}',
    ],
)
def test_what_is_damaged_is_measured_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    assert Kept(tmp_path).read("x") is None
    Kept(tmp_path).write("x", {2: 0.5})
    assert Kept(tmp_path).read("x") == {2: 0.5}


def test_the_file_is_bounded_and_a_folder_that_takes_nothing_stops_nobody(tmp_path: Path) -> None:
    for i in range(MOST_KEPT + 3):
        Kept(tmp_path).write(f"{i}", {2: 1.0})
    found = json.loads((tmp_path / FILE).read_text())
    assert [*found] == [f"{i}" for i in range(3, MOST_KEPT + 3)]
    Kept(tmp_path / "missing").write("x", COSTS)
    assert not (tmp_path / "missing").exists()
