"""Caps as a table: half where memory ended, a quarter more after 16 good ticks that filled it, never above the most."""

from __future__ import annotations

from itertools import count

import pytest

from app.engine.caps import MOST_GROUPS, PATIENCE, Caps

GROUP = ("sd", 64, 48, 77)
OTHER = ("sd", 48, 64, 77)


@pytest.mark.parametrize(
    ("most", "tried", "grows"),
    [
        (64, 64, [32, 40, 50, 62, 64]),
        (8, 8, [4, 5, 6, 7, 8]),
        (8, 7, [3, 4, 5, 6, 7, 8]),
        (6, 2, [1, 2, 3, 4, 5, 6]),
        (2, 1, [1, 2]),
        (1, 1, [1]),
    ],
)
def test_a_cap_falls_to_half_and_grows_by_a_quarter(most: int, tried: int, grows: list[int]) -> None:
    caps = Caps(lambda group: most)
    assert caps(GROUP) == most
    caps.fell(GROUP, tried)
    seen = [caps(GROUP)]
    while caps(GROUP) < most:
        for _ in range(PATIENCE - 1):
            caps.held(GROUP, caps(GROUP))
            assert caps(GROUP) == seen[-1]
        caps.held(GROUP, caps(GROUP))
        seen.append(caps(GROUP))
    assert seen == grows
    for _ in range(3 * PATIENCE):
        caps.held(GROUP, most)
    assert caps(GROUP) == most


@pytest.mark.parametrize(
    ("done", "each", "fills"),
    [(8, 1, True), (9, 1, True), (7, 1, False), (7, 2, True), (6, 2, False), (6, 3, True), (1, 1, False)],
)
def test_what_fills_a_cap_of_eight(done: int, each: int, fills: bool) -> None:
    """A tick counts where no other image of its largest would have fitted."""
    caps = Caps(lambda group: 64)
    caps.fell(GROUP, 16)
    for _ in range(PATIENCE):
        caps.held(GROUP, done, each)
    assert (caps(GROUP) > 8) is fills


def test_a_fall_begins_the_count_anew() -> None:
    caps = Caps(lambda group: 64)
    caps.fell(GROUP, 64)
    for _ in range(PATIENCE - 1):
        caps.held(GROUP, 32)
    caps.fell(GROUP, 32)
    for _ in range(PATIENCE - 1):
        caps.held(GROUP, 16)
    assert caps(GROUP) == 16
    caps.held(GROUP, 16)
    assert caps(GROUP) == 20


def test_each_group_has_its_own() -> None:
    caps = Caps(lambda group: {"sd": 64, "dit": 8}[group[0]])
    caps.fell(GROUP, 64)
    assert [caps(group) for group in (GROUP, OTHER, ("dit", 64, 48, 77))] == [32, 64, 8]
    for _ in range(PATIENCE):
        caps.held(OTHER, 64)
    assert caps(GROUP) == 32


def test_groups_are_bounded_and_the_one_that_fell_longest_ago_makes_room() -> None:
    caps = Caps(lambda group: 64)
    for side, _ in zip(count(8, 8), range(MOST_GROUPS + 1), strict=False):
        caps.fell(("sd", side, 8, 77), 64)
    assert caps(("sd", 8, 8, 77)) == 64
    assert caps(("sd", 16, 8, 77)) == 32
