"""Which tests reach which line: every test file once under coverage, in a fork of its own, kept until a file changes.

A file of its own means fixtures of its own, so a file reaches what its fixtures reach, whichever test came first.
Servers that tests start are measured too, but not for which test: like imports, their lines count for the whole file.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.bench.mutant_draw import digest
from tests.bench.mutant_runs import COVERAGE, SITE, Fork, Tests, Timing

LEFT_OUT = ("test_playground.py", "test_deploy_ray.py", "test_deploy_docker.py")
"""Browsers, clusters and containers: slow, and about other things than the code that is mutated."""
UNREACHED = ("tests/e2e/test_server_process.py", "tests/unit/test_app_cli.py")
"""Tried on lines that no test is known to reach."""
LIMIT = 900.0
LONGEST = 30.0
"""Seconds of tests after which a batch takes no further file."""


@dataclass(frozen=True)
class Reach:
    """What one test file reaches."""

    file: str
    digests: Mapping[str, str]
    """Of the test file and of all that it reached, when it was measured."""
    seconds: Mapping[str, float]
    """By test."""
    failed: Collection[str]
    lines: Mapping[str, Mapping[str, Sequence[str]]]
    """Path, line: tests that run it, or "" for the file's import, a fixture, or a process that it started."""

    def of(self, path: str, lines: Iterable[int]) -> set[str]:
        """Tests that run one of these lines, with "" as above."""
        known = self.lines.get(path, {})
        return {test for line in lines for test in known.get(str(line), ())}

    def fresh(self, root: Path) -> bool:
        """Whether nothing that it rests on has changed."""
        return all(
            (root / path).is_file() and digest((root / path).read_text()) == d for path, d in self.digests.items()
        )


def test_files(root: Path) -> list[str]:
    """The default suite, without what is left out."""
    files = (
        file for kind in ("unit", "integration", "e2e") for file in sorted((root / "tests" / kind).glob("test_*.py"))
    )
    return [str(file.relative_to(root)) for file in files if file.name not in LEFT_OUT or "e2e" not in file.parts]


def reaches(trees: Sequence[Path], kept: Path, anew: bool, without: Sequence[str] = ()) -> list[Reach]:
    """What every test file reaches: as kept where that is fresh, else measured, as many at a time as there are trees.

    Files with one of `without` in their names are left out.
    """
    kept.mkdir(parents=True, exist_ok=True)
    files = [file for file in test_files(trees[0]) if not any(part in file for part in without)]
    stale = [file for file in files if anew or (known := _kept(kept, file)) is None or not known.fresh(trees[0])]
    fork = get_context("fork")
    measuring = [fork.Process(target=_measure_all, args=(t, stale[i :: len(trees)], kept)) for i, t in enumerate(trees)]
    for process in measuring:
        process.start()
    for process in measuring:
        process.join()
        if process.exitcode:
            raise RuntimeError("a test file could not be measured, see above")
    return [reach for file in files if (reach := _kept(kept, file)) is not None]


def _record(kept: Path, file: str) -> Path:
    return kept / f"{file.replace('/', '.')}.json"


def _kept(kept: Path, file: str) -> Reach | None:
    record = _record(kept, file)
    return Reach(**json.loads(record.read_text())) if record.is_file() else None


def _measure_all(tree: Path, files: Sequence[str], kept: Path) -> None:
    for file in files:
        reach = _measure(tree, file)
        _record(kept, file).write_text(json.dumps(vars(reach)))
        seconds = sum(reach.seconds.values())
        print(f"{file}: {len(reach.seconds)} tests, {seconds:.0f} s, fail: {sorted(reach.failed)}", flush=True)


def _measure(tree: Path, file: str) -> Reach:
    home = tree.parent
    for old in home.glob("coverage-data*"):
        old.unlink()
    settings, timing, site = home / "coveragerc", home / "timing.json", home / "site"
    settings.write_text(COVERAGE.format(tree=tree, data=home / "coverage-data"))
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE)
    timing.unlink(missing_ok=True)
    options = ["--cov", "--cov-context=test", "--cov-report=", f"--cov-config={settings}"]
    os.environ |= {"COVERAGE_PROCESS_START": str(settings), "MUTANTS_SITE": str(site)}
    with Fork(tree, Tests([file]), options, LIMIT, Timing(timing)) as fork:
        code = fork.wait()
    for name in ("COVERAGE_PROCESS_START", "MUTANTS_SITE"):
        del os.environ[name]
    if not timing.is_file() or code == "hung":
        raise RuntimeError(f"{file} ends with {code} under coverage:\n{fork.log.read_text()[-4000:]}")
    lines = _lines(tree, sorted(home.glob("coverage-data*")))
    digests = {path: digest((tree / path).read_text()) for path in [file, *lines]}
    return Reach(file, digests, lines=lines, **json.loads(timing.read_text()))


def _lines(tree: Path, data: Iterable[Path]) -> dict[str, dict[str, list[str]]]:
    from coverage import CoverageData

    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for part in data:
        measured = CoverageData(str(part))
        measured.read()
        for name in measured.measured_files():
            path = str(Path(name).relative_to(tree))
            for line, contexts in measured.contexts_by_lineno(name).items():
                found[path][str(line)] |= {test for context in contexts for test in _tests(context)}
    return {path: {line: sorted(tests) for line, tests in lines.items()} for path, lines in found.items()}


def _tests(context: str) -> Iterator[str]:
    test, _, phase = context.rpartition("|")
    yield test if phase == "run" else ""
    if phase == "setup":  # a fixture: run by this test first, perhaps for others too
        yield test


@dataclass(frozen=True)
class Batch:
    """Tests that run in one process, and how long they take when nothing is broken."""

    tests: Tests
    seconds: float = 0.0
    slowest: float = 0.0

    @property
    def patience(self) -> float:
        """Seconds after which a single test hangs, also on a machine that does other things."""
        return max(60.0, 5 * self.slowest)


def batches(reach: Sequence[Reach], path: str, lines: range, sources: Mapping[str, str]) -> list[Batch]:
    """Tests for a mutation of these lines, the most telling and fastest first.

    First the tests that run the lines, then the rest of the files that reach them by an import, a fixture or a process:
    files that bear the module's name before files that name it in an import, unit tests before others.
    """
    direct: list[tuple[float, Reach, set[str]]] = []
    whole: list[tuple[tuple[int, bool, float], Reach, set[str]]] = []
    for one in reach:
        tests, good = one.of(path, lines), set(one.seconds) - set(one.failed)
        first, rest = tests & good, good - tests if "" in tests else set()
        if first:
            direct.append((_seconds(one, first), one, first))
        if rest:
            key = (_kinship(one.file, path, sources), "unit" not in one.file, _seconds(one, rest))
            whole.append((key, one, rest))
    direct.sort(key=lambda entry: entry[0])
    whole.sort(key=lambda entry: entry[0])
    chosen = [(one, tests) for _, one, tests in direct] + [(one, tests) for _, one, tests in whole]
    return list(_packed(chosen))


def within(planned: Sequence[Batch], budget: float) -> list[Batch]:
    """As many of the first batches as are begun before `budget` seconds are spent."""
    return [batch for n, batch in enumerate(planned) if sum(before.seconds for before in planned[:n]) < budget]


def unreached(reach: Sequence[Reach]) -> Batch:
    """The tests for lines that no test is known to reach."""
    chosen = [(one, set(one.seconds) - set(one.failed)) for one in reach if one.file in UNREACHED]
    return next(_packed(chosen, room=float("inf")))


def others(reach: Sequence[Reach], done: Sequence[Batch]) -> list[Batch]:
    """The rest of the suite."""
    ran = {test for batch in done for test in batch.tests.order}
    left = [(one, set(one.seconds) - set(one.failed) - ran) for one in reach]
    return list(_packed([(one, tests) for one, tests in left if tests]))


def _packed(chosen: Sequence[tuple[Reach, set[str]]], room: float = 4.0) -> Iterator[Batch]:
    """Small batches first: most mutants die at once, and need not wait until every test file is imported."""
    files: dict[str, None] = {}
    tests: dict[str, float] = {}
    for one, names in chosen:
        files[one.file] = None
        tests |= {name: one.seconds[name] for name in sorted(names, key=lambda name: one.seconds[name])}
        if sum(tests.values()) > room:
            yield _batch(files, tests)
            room, files, tests = min(room * 4, LONGEST), {}, {}
    if tests:
        yield _batch(files, tests)


def _batch(files: Mapping[str, None], tests: Mapping[str, float]) -> Batch:
    order = {test: rank for rank, test in enumerate(tests)}
    return Batch(Tests(list(files), order), sum(tests.values()), max(tests.values()))


def _seconds(one: Reach, tests: Iterable[str]) -> float:
    return sum(one.seconds[test] for test in tests)


def _kinship(file: str, path: str, sources: Mapping[str, str]) -> int:
    module = Path(path).with_suffix("") if Path(path).name != "__init__.py" else Path(path).parent
    if module.name in Path(file).stem:
        return 0
    return 1 if str(module).replace("/", ".") in sources[file] else 2


def statement(text: str, first: int, last: int) -> range:
    """The lines of the smallest statement around a mutation, without the body of a loop, a function and the like."""
    found = range(first, last + 1)
    size = sys.maxsize
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt):
            span = _own_lines(node)
            if span.start <= first and last < span.stop and len(span) <= size:
                found, size = span, len(span)
    return found


def _own_lines(node: Any) -> range:
    start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
    body = getattr(node, "body", None)
    return range(start, body[0].lineno if body and body[0].lineno > start else node.end_lineno + 1)
