"""The mutation run's pure parts: what is drawn, what counts, which tests come first, what the table says."""

from __future__ import annotations

from itertools import islice

import pytest

from tests.bench.mutant_draw import Mutation, changes_behaviour, draw, population
from tests.bench.mutant_reach import Reach, batches, others, statement, within
from tests.bench.mutant_report import Result, core, report, table
from tests.bench.mutant_runs import ROOT


def mutation(path: str, n: int) -> Mutation:
    return Mutation(path, "text", "core/AddNot", n, line=n, last_line=n)


def drawn(seed: int, count: int, **lines: int) -> list[tuple[str, int]]:
    """Each file has a mutation a line, of which the odd ones count."""
    found = draw(
        lines, seed, lambda path: [mutation(path, n) for n in range(lines[path])], lambda m: m.occurrence % 2 == 1
    )
    return [(one.path, one.occurrence) for one in islice(found, count)]


def test_a_seed_draws_the_same_and_more_of_it_the_same_first() -> None:
    lines = {"small": 20, "large": 200}
    assert drawn(7, 40, **lines) == drawn(7, 40, **lines)
    assert drawn(7, 40, **lines) == drawn(7, 60, **lines)[:40]
    assert drawn(7, 40, **lines) == drawn(7, 40, **dict(reversed(lines.items())))
    assert drawn(7, 40, **lines) != drawn(8, 40, **lines)


def test_what_is_drawn_counts_and_comes_once() -> None:
    everything = drawn(7, 1000, small=20, large=200)
    assert sorted(everything) == [
        (path, n) for path, size in (("large", 200), ("small", 20)) for n in range(1, size, 2)
    ]


def test_files_are_drawn_by_their_lines_not_by_their_mutations() -> None:
    dense = {"plain": 100, "dense": 100}
    found = islice(
        draw(dense, 7, lambda p: [mutation(p, n) for n in range(5000 if p == "dense" else 500)], lambda _: True), 400
    )
    assert 150 < sum(one.path == "plain" for one in found) < 250
    assert 70 < sum(path == "small" for path, _ in drawn(7, 400, small=1000, large=4000)) < 90


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("def f(x: int | None) -> str | None: ...", "def f(x: int & None) -> str + None: ..."),
        ("class A:\n    x: int | None = 1", "class A:\n    x: int // None = 1"),
        ("class A:\n    x: Literal[1]", "class A:\n    x: Literal[2]"),
        ('def f():\n    """Not 1."""\n    return 1', 'def f():\n    """Not 2."""\n    return 1'),
        ('__all__ = ["a" + "b"]', '__all__ = ["a" - "b"]'),
        ("if TYPE_CHECKING:\n    x = 1", "if TYPE_CHECKING:\n    x = 2"),
        ("@override\ndef f(): ...", "def f(): ..."),
        ("def f(*, x): ...", "def f(+, x): ..."),
        ("x = (1)", "x = 1"),
    ],
    ids=["argument", "field", "literal", "docstring", "all", "types", "decorator", "syntax", "form"],
)
def test_what_nothing_could_notice_does_not_count(before: str, after: str) -> None:
    assert not changes_behaviour(before, after)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("x: int = 1", "x: int = 2"),
        ("def f(x: int | None = 1): ...", "def f(x: int | None = 0): ..."),
        ("x: Annotated[int, Field(ge=1)]", "x: Annotated[int, Field(ge=2)]"),
        ("def f(x: Annotated[int | None, Query(ge=1)]): ...", "def f(x: Annotated[int | None, Query(ge=0)]): ..."),
        ("@property\ndef f(self): ...", "def f(self): ..."),
        ("if not TYPE_CHECKING:\n    x = 1", "if not TYPE_CHECKING:\n    x = 2"),
        ("isinstance(x, A | B)", "isinstance(x, A & B)"),
    ],
    ids=["value", "default", "field", "query", "decorator", "run", "union"],
)
def test_what_runs_counts(before: str, after: str) -> None:
    assert changes_behaviour(before, after)


def test_the_population_is_the_product() -> None:
    paths = set(population(ROOT))
    assert {"app/http/main.py", "models/__init__.py"} <= paths
    assert not any(path.startswith(("models/training", "models/bundled", "tests")) for path in paths)


TEXT = """LIMIT = 4

@wraps(
    LIMIT
)
def f(x=1,
      y=2):
    if (x
            > y):
        return g(
            x - 1
        )
"""


@pytest.mark.parametrize(
    ("line", "lines"),
    [(1, range(1, 2)), (4, range(3, 8)), (7, range(3, 8)), (9, range(8, 10)), (11, range(10, 13))],
    ids=["constant", "decorator", "default", "condition", "call"],
)
def test_lines_of_a_statement_without_its_body(line: int, lines: range) -> None:
    assert statement(TEXT, line, line) == lines


def reach(file: str, seconds: dict[str, float], lines: dict[int, list[str]], failed: tuple[str, ...] = ()) -> Reach:
    return Reach(file, {}, seconds, failed, {"app/engine/pace.py": {str(line): tests for line, tests in lines.items()}})


REACH = [
    reach("tests/integration/test_slow.py", {"slow": 50.0, "slower": 60.0}, {8: ["slow"]}),
    reach("tests/integration/test_importing.py", {"importing": 0.1}, {8: [""]}),
    reach("tests/unit/test_other.py", {"other": 0.2, "broken": 0.1}, {8: [""], 9: ["broken"]}, failed=("broken",)),
    reach("tests/unit/test_app_pace.py", {"b": 0.3, "a": 0.1, "c": 3.0}, {8: ["", "a", "b"]}),
    reach("tests/unit/test_far.py", {"far": 1.0}, {7: ["far"]}),
]
SOURCES = {one.file: "import app.engine.pace" if "importing" in one.file else "" for one in REACH}


def order(lines: range, budget: float = 1000.0) -> list[list[str]]:
    planned = batches(REACH, "app/engine/pace.py", lines, SOURCES)
    return [list(batch.tests.order) for batch in within(planned, budget)]


def test_tests_of_the_line_first_then_the_files_that_import_it() -> None:
    assert order(range(8, 9)) == [["a", "b", "slow"], ["c", "importing", "other"]]
    assert order(range(7, 8)) == [["far"]]
    assert order(range(20, 21)) == []
    assert order(range(7, 9))[0] == ["a", "b", "far", "slow"]


def test_tests_that_fail_anyway_tell_nothing() -> None:
    assert order(range(9, 10)) == []


def test_a_budget_ends_the_list() -> None:
    assert order(range(8, 9), budget=10.0) == [["a", "b", "slow"]]


def test_the_rest_is_what_has_not_run() -> None:
    done = batches(REACH, "app/engine/pace.py", range(8, 9), SOURCES)[:1]
    assert sorted(test for batch in others(REACH, done) for test in batch.tests.order) == [
        "c", "far", "importing", "other", "slower",
    ]  # fmt: skip


def result(path: str, outcome: str, line: int = 3) -> Result:
    return Result(f"{path}:{line}:{outcome}", path, line, outcome, 1.0, 5, 2 * (line == 9), "", "-a\n+b")


RESULTS = [
    result("models/plan.py", "killed"),
    result("models/plan.py", "survived", line=9),
    result("models/plan.py", "hung"),
    result("app/cli.py", "uncovered", line=30),
    result("app/engine/engine.py", "killed"),
]


def test_table_by_module_core_and_all() -> None:
    assert table(RESULTS).splitlines()[2:] == [
        "| `app/cli.py` | 1 | 0 | 0 | 0 | 1 | 0 |",
        "| `app/engine/engine.py` | 1 | 1 | 0 | 0 | 0 | 100 |",
        "| `models/plan.py` | 3 | 1 | 1 | 1 | 0 | 67 |",
        "| **engine, models, accelerators** | 4 | 2 | 1 | 1 | 0 | 75 |",
        "| **all** | 5 | 2 | 1 | 1 | 1 | 60 |",
    ]
    assert table([]).splitlines()[-1] == "| **all** | 0 | 0 | 0 | 0 | 0 | - |"


def test_a_report_shows_what_survived_and_only_that() -> None:
    text = report(RESULTS, "5 mutants")
    headings = [line for line in text.splitlines() if line.startswith("###")]
    assert headings == [
        "### app/cli.py:30 (uncovered, 5 tests)",
        "### models/plan.py:9 (survived, 5 tests, 2 more reach it)",
    ]
    assert text.count("```diff\n-a\n+b\n```") == 2


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("app/engine/engine.py", True),
        ("app/engine/engine/tick.py", True),
        ("models/accelerators/deepcache.py", True),
        ("app/cli.py", False),
        ("models/quality/metrics.py", False),
        ("models/search/attention_search.py", False),
        ("models/costs/macs.py", False),
    ],
)
def test_the_core_is_what_serves(path: str, inside: bool) -> None:
    assert core(path) is inside
