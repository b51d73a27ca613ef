"""The batcher as tables: who is in which tick."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import pytest

from app.engine.batcher import LOOKAHEAD, Batcher
from app.engine.budget import Budget
from app.engine.pace import Pace, measure, pays, retry_after


@dataclass(eq=False)
class Image:
    name: str
    group: Hashable = "g"
    num_rows: int = 2
    work: float = 0.0
    share: Hashable = ""
    weight: float = 1.0

    @property
    def request(self) -> Hashable:
        return self.name.partition(".")[0]

    def __repr__(self) -> str:
        return self.name


def make(*images: Image, cap: int = 4) -> Batcher[Image, Hashable]:
    batcher: Batcher[Image, Hashable] = Batcher(lambda _: cap)
    for image in images:
        batcher.add(image)
    return batcher


def names(tick: list[Image]) -> str:
    return "".join(image.name for image in tick)


def test_nothing_to_do() -> None:
    assert make().next() == []


@pytest.mark.parametrize(
    ("rows", "cap", "expected"),
    [
        ([2, 2, 2], 4, "ab"),
        ([2, 2, 2], 5, "ab"),
        ([2, 1, 1, 1], 4, "abc"),
        ([1, 2, 1], 2, "ac"),  # b does not fit, the smaller c behind it does
        ([2, 2], 1, "a"),  # one that is wider than the cap goes alone
        ([1, 1, 1], 2, "ab"),
        ([2], 64, "a"),
    ],
)
def test_oldest_first_while_rows_fit(rows: list[int], cap: int, expected: str) -> None:
    images = [Image("abcd"[i], num_rows=n) for i, n in enumerate(rows)]
    assert names(make(*images, cap=cap).next()) == expected


def test_the_oldest_keep_their_place_until_they_leave() -> None:
    a, b, c = Image("a"), Image("b"), Image("c")
    batcher = make(a, b, c)
    assert names(batcher.next()) == names(batcher.next()) == "ab"
    batcher.discard(a)
    assert names(batcher.next()) == "bc"


def test_an_image_passed_over_is_first_at_last() -> None:
    images = [Image("a", num_rows=1), Image("B", num_rows=2), Image("c", num_rows=1), Image("d", num_rows=1)]
    batcher = make(*images, cap=2)
    assert names(batcher.next()) == "ac"
    batcher.discard(images[0])
    assert names(batcher.next()) == "B"


def run(batcher: Batcher[Image, Hashable], rows: dict[Image, int], ticks: int = 10_000) -> list[str]:
    """Ticks of images that have so many `rows` left each, until all are done; who has none left is discarded."""
    found: list[str] = []
    while len(batcher) and len(found) < ticks:
        tick = batcher.next()
        found.append(names(tick))
        for image in tick:
            batcher.begin(image) if image not in begun_of(batcher) else None
            rows[image] -= image.num_rows
            if rows[image] <= 0:
                batcher.discard(image)
    return found


def begun_of(batcher: Batcher[Image, Hashable]) -> set[Image]:
    """Who has begun."""
    lines = [line for group in batcher._groups.values() for line in group.values()]
    return {entry.item for line in lines for entry in line.begun}


def sized(table: dict[str, int], cap: int = 2, **facts: Hashable) -> tuple[Batcher[Image, Hashable], dict[Image, int]]:
    """Images of two rows a step with so much work each, by name; `a1` is of share a. All come at once."""
    images = {Image(name, work=work, share=name[0], **facts): work for name, work in table.items()}  # type: ignore[arg-type]
    return make(*images, cap=cap), images


@pytest.mark.parametrize(
    ("table", "order"),
    [
        ({"a1": 10, "a2": 4}, "a2 a2 a1 a1 a1 a1 a1"),  # a small one passes a large one before it
        ({"a1": 4, "a2": 4}, "a1 a1 a2 a2"),  # equal ones in the order in which they came
        ({"a1": 6, "b1": 6}, "a1 b1 a1 b1 a1 b1"),  # clients get equal numbers of rows
        ({"a1": 6, "a2": 6, "b1": 4}, "b1 a1 b1 a1 a1 a2 a2 a2"),  # whatever each of them asks for
        ({"a1": 8, "b1": 4, "b2": 4}, "b1 a1 b1 a1 b2 a1 b2 a1"),
        ({"a1": 4, "b1": 4, "c1": 2}, "c1 a1 b1 a1 b1"),
    ],
)
def test_the_share_served_least_goes_first_and_in_it_who_is_due_first(table: dict[str, int], order: str) -> None:
    assert run(*sized(table)) == order.split()


@pytest.mark.parametrize("small", [2, 10, 40])
def test_a_large_request_is_passed_by_as_much_as_it_has_to_do_for_each_beside_it(small: int) -> None:
    """A small one is there at every moment, from the same client: of both together 200 rows, and then the large one."""
    large = Image("L", work=100)
    batcher, passed = make(large, cap=2), 0
    while True:
        batcher.add(Image(f"s{passed}", work=small))
        for _ in range(small // 2):
            tick = batcher.next()
            if tick == [large]:
                assert 200 - 2 * small <= passed <= 200
                return
            passed += 2
        batcher.discard(tick[0])


def test_a_flood_does_not_delay_another_client() -> None:
    batcher, rows = sized({f"a{i}": 50 for i in range(40)}, cap=8)
    assert all(tick.count("a") == 4 for tick in run(batcher, rows, ticks=6))
    late = Image("b1", work=8, share="b")
    rows[late] = 8
    batcher.add(late)
    ticks = run(batcher, rows, ticks=4)
    assert all("b1" in tick and tick.count("a") == 3 for tick in ticks), "in every tick, and the others fill it"
    assert late not in batcher._entries


def test_who_was_away_neither_catches_up_nor_owes() -> None:
    batcher, rows = sized({"a1": 40, "b1": 4}, cap=2)
    run(batcher, rows, ticks=10)  # b is done after four
    again = Image("b2", work=100, share="b")
    rows[again] = 100
    batcher.add(again)
    assert sorted(run(batcher, rows, ticks=10)) == ["a1"] * 5 + ["b2"] * 5


@pytest.mark.parametrize(("weight", "share"), [(1.0, 10), (2.0, 13), (4.0, 16), (0.25, 4)])
def test_a_share_of_more_weight_gets_more_rows(weight: float, share: int) -> None:
    batcher = make(Image("a", work=100, share="a"), Image("b", work=100, share="b", weight=weight), cap=2)
    ticks = [names(batcher.next()) for _ in range(20)]
    assert abs(ticks.count("b") - share) <= 1
    assert ticks.count("a") + ticks.count("b") == 20


def test_small_requests_pass_a_whole_flood_of_the_same_client() -> None:
    """Twenty that have begun long ago are due after one that has little to do, whatever they were served together."""
    batcher, rows = sized({f"a{i}": 50 for i in range(20)}, cap=8)
    run(batcher, rows, ticks=60)  # 480 of 1000 rows
    late = Image("a99", work=6, share="a")
    rows[late] = 6
    batcher.add(late)
    assert all(tick.startswith("a99") for tick in run(batcher, rows, ticks=3))
    assert late not in batcher._entries


@pytest.mark.parametrize("images", [1, 4])
def test_a_request_of_many_images_counts_as_one(images: int) -> None:
    """By images, its own would keep it from ever being due beside small requests."""
    large = [Image(f"L.{i}", work=100) for i in range(images)]
    batcher, passed = make(*large, cap=2), 0
    while True:
        batcher.add(small := Image(f"s{passed}", work=2))
        tick = batcher.next()
        if tick != [small]:
            break
        batcher.discard(small)
        passed += 2
    assert 194 <= passed <= 200


def test_groups_follow_the_same_rule() -> None:
    """Clients of different groups take turns; in a client the image that is due first names the group."""
    batcher = make(*[Image(f"{g}{i}", group=g, share=g, work=10) for g in "xyz" for i in range(3)])
    assert [names(batcher.next()) for _ in range(6)] == ["x0x1", "y0y1", "z0z1"] * 2
    small = make(Image("x", group="x", work=50), Image("y", group="y", work=10))
    assert names(small.next()) == "y"


def test_a_tick_is_filled_whoever_is_first() -> None:
    images = [Image(f"a{i}", share="a", work=100) for i in range(4)] + [Image("b0", share="b", work=2)]
    assert names(make(*images, cap=8).next()) == "b0a0a1a2"


def test_what_may_begin_ahead_of_what_has_begun_is_bounded() -> None:
    """Ever smaller requests pass those that have begun, until as many have as two ticks have rows."""
    batcher = make(cap=4)
    begun = 0
    for work in range(10_000, 0, -100):
        batcher.add(Image(str(work), work=work))
        for image in batcher.next():
            if image not in begun_of(batcher):
                batcher.begin(image)
        begun = len(begun_of(batcher))
    assert begun == 8


def test_a_small_request_begins_beside_one_whose_images_fill_many_ticks() -> None:
    large = [Image(f"L.{i}", work=5000) for i in range(10)]
    batcher = make(*large, cap=4)
    for image in large:  # all images of a request begin together
        batcher.begin(image)
    batcher.add(small := Image("s", work=10))
    assert small in batcher.next()


@pytest.mark.parametrize(
    ("begun", "admitted", "expected"),
    [
        ("ab", "", "ab"),
        ("a", "c", "ac"),
        ("b", "", "b"),
        ("", "", ""),
        ("", "abc", "abc"),
    ],
)
def test_only_the_admitted_start(begun: str, admitted: str, expected: str) -> None:
    images = [Image(name, num_rows=1) for name in "abc"]
    batcher = make(*images)
    for image in images:
        if image.name in begun:
            batcher.begin(image)
    assert names(batcher.next(lambda image: image.name in admitted)) == expected


def test_a_tick_looks_at_a_bounded_part_of_the_line_and_at_all_that_has_begun() -> None:
    last, asked = Image("last"), []
    batcher = make(*[Image(str(i)) for i in range(2 * LOOKAHEAD)], last)

    def refuse(image: Image) -> bool:
        asked.append(image)
        return False

    assert batcher.next(refuse) == []
    assert len(asked) == LOOKAHEAD
    batcher.begin(last)
    assert batcher.next(refuse) == [last]


def test_what_has_begun_keeps_its_place_by_age() -> None:
    a, b, c, d = (Image(name) for name in "abcd")
    batcher = make(a, b, c, d, cap=6)
    batcher.begin(d)
    batcher.begin(b)
    assert names(batcher.next()) == "abc"
    batcher.discard(b)
    assert names(batcher.next()) == "acd"


def test_nobody_is_asked_to_start_whose_rows_do_not_fit() -> None:
    asked: list[str] = []

    def admit(image: Image) -> bool:
        asked.append(image.name)
        return True

    first = Image("a")
    batcher = make(first, Image("b", num_rows=4), Image("c"), cap=4)
    batcher.begin(first)
    assert names(batcher.next(admit)) == "ac"
    assert asked == ["c"]


def test_who_may_not_start_keeps_its_turn() -> None:
    x, y = Image("x", group="x", share="x"), Image("y", group="y", share="y")
    batcher = make(x, y)
    assert names(batcher.next(lambda image: image is y)) == "y"
    assert names(batcher.next()) == "x"
    assert names(batcher.next()) == "x", "which was served less"
    assert names(batcher.next()) == "y"


def test_the_caps_are_by_group_and_asked_anew() -> None:
    caps = {"x": 2, "y": 4}
    batcher: Batcher[Image, Hashable] = Batcher(lambda group: caps[str(group)])
    for group in "xxxyyy":
        batcher.add(Image(group, group=group, share=group))
    assert [names(batcher.next()) for _ in range(2)] == ["x", "yy"]
    caps["x"] = 6
    assert [names(batcher.next()) for _ in range(2)] == ["xxx", "yy"]


def test_nothing_is_kept_of_a_group_that_is_empty() -> None:
    asked: list[Hashable] = []

    def cap(group: Hashable) -> int:
        asked.append(group)
        return 4

    batcher: Batcher[Image, Hashable] = Batcher(cap)
    images = [Image(str(i), group=i) for i in range(50)]
    for image in images:
        batcher.add(image)
    for image in images[::2]:
        batcher.begin(image)
    for image in images[1:]:
        batcher.discard(image)
    assert len(batcher) == 1
    batcher.discard(images[0])
    assert batcher.next() == []
    assert asked == [], "lists of groups that are gone"
    assert not any((batcher._groups, batcher._accounts, batcher._entries))


def test_who_is_not_in_the_line_is_not_missed() -> None:
    a, b, stranger = Image("a", num_rows=1), Image("b", num_rows=1), Image("c", num_rows=1)
    batcher = make(a, b)
    batcher.begin(b)
    batcher.discard(stranger)
    batcher.discard(Image("d", group="elsewhere"))
    assert len(batcher) == 2
    assert names(batcher.next()) == "ab"
    batcher.discard(b)
    assert len(batcher) == 1


def test_nobody_is_asked_once_the_tick_is_full() -> None:
    asked: list[str] = []

    def admit(image: Image) -> bool:
        asked.append(image.name)
        return True

    batcher = make(*[Image(name) for name in "abcd"], cap=4)
    assert names(batcher.next(admit)) == "ab"
    assert asked == ["a", "b"]


@pytest.mark.parametrize(
    ("limit", "reserved", "needs", "expected"),
    [
        (100, 0, [40, 40, 40], "110"),
        (100, 90, [40, 5, 0], "001"),  # the first that does not fit closes it for all who need something
        (100, 0, [400, 1], "10"),  # more than there is: goes alone, when nobody holds anything
        (100, 1, [400, 1], "00"),
        (0, 0, [1, 1], "10"),
        (0, 5, [0, 0], "11"),
    ],
)
def test_the_budget_for_features(limit: int, reserved: int, needs: list[int], expected: str) -> None:
    budget = Budget(limit)
    budget.reserved = reserved
    admission = budget.admission()
    assert "".join(str(int(admission.admit(need))) for need in needs) == expected


def test_discard_is_forgiving_and_complete() -> None:
    a = Image("a")
    batcher = make(a)
    batcher.discard(a)
    batcher.discard(a)
    assert len(batcher) == 0
    assert batcher.next() == []


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, 1), (0.2, 1), (1.2, 2), (59.0, 59), (1e9, 3600)])
def test_retry_after_is_whole_seconds_in_bounds(seconds: float, expected: int) -> None:
    assert retry_after(seconds) == expected


def test_the_pace_is_learned_by_model() -> None:
    pace = Pace()
    for _ in range(100):
        pace.observe("fast", 10, 0.1)
        pace.observe("slow", 2, 2.0)
    assert pace.predict([("fast", 100), ("slow", 5)]) == pytest.approx(1.0 + 5.0)
    assert pace.predict([]) == 0.0
    assert pace.predict([("unknown", 10)]) > 0


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({2: 1.0, 4: 1.1, 8: 1.3, 16: 2.6}, 8),  # at 16 a row costs what it did at 8
        ({2: 1.0, 4: 2.0, 8: 4.0, 16: 8.0}, 2),
        ({2: 1.0, 4: 2.1, 8: 1.5, 16: 2.9}, 8),  # one slow tick on the way ends nothing
        ({2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0}, 16),  # the most that is allowed
        ({2: 50.0}, 2),  # too slow to measure more
    ],
)
def test_the_knee(seconds: dict[int, float], expected: int) -> None:
    assert pays(measure(seconds.__getitem__, most=16, budget=20.0)) == expected
