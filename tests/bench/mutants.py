"""Mutation run: small faults are put into a copy of the code, one at a time, and the tests should notice.

    pip install ".[test,bench]"
    python -m tests.bench.mutants --count 100 --seed 7 --jobs 2   goes on where it stopped; report in runs/mutants
    python -m tests.bench.mutants --module app/engine/batcher.py         mutants of one file, or of one folder
    python -m tests.bench.mutants --report                        the report again, from what has been run
    python -m tests.bench.mutants --coverage                      only measures anew which tests reach which line

The mutations are cosmic-ray's: operators, comparisons, numbers, conditions, loops, exceptions, decorators. Of `app` and
`models`, without training, distilling and the shapes, all count but those that nothing could notice: in docstrings and
annotations (calls inside an annotation are read by pydantic, and stay), in `__all__`, in blocks and decorators for type
checkers, and where the result is no Python. No operator changes a string, so messages stay as they are.

A mutant meets first the tests that run its line, the fastest first, then the rest of the files that reach it by an
import, a fixture or a process that they start, until `--budget` seconds are spent; with `--rest` the rest of the suite
too. It is killed by the first failure. A run that hangs is ended, and counts as killed. For lines that no test reaches,
the tests of the command line and of the server process are tried. Which tests reach a line is measured once, test file
by test file, kept under runs/mutants/reach, and measured anew where the test file or code that it reaches has changed.

Each job has a copy of the checkout in a temporary folder, so the checkout may be worked on meanwhile. torch and such
libraries are imported once, and every run is a fork of that process. Read the survivors: some change nothing of weight.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from tests.bench.mutant_draw import Mutation, changes_behaviour, draw, mutated, mutations, population
from tests.bench.mutant_reach import Reach, batches, others, reaches, statement, unreached, within
from tests.bench.mutant_report import Result, report
from tests.bench.mutant_runs import ROOT, Fork, copy_checkout, import_heavy

HOME = ROOT / "runs" / "mutants"
RESULTS = HOME / "results.jsonl"
PASSED = {0, 5}
"""Exit codes of pytest: all passed, or the mutation left no test of these."""


def main() -> None:
    """Measure, draw, run, report, as the options say."""
    parser = argparse.ArgumentParser("python -m tests.bench.mutants", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--count", type=int, default=100, help="mutants; more of a seed are the same and then others")
    add("--seed", type=int, default=7)
    add("--module", action="append", default=[], help="only mutants of this file or folder; may be repeated")
    add("--jobs", type=int, default=1, help="mutants at a time")
    add("--timeout", type=float, default=300, help="seconds after which a run of tests hangs")
    add("--budget", type=float, default=120, help="seconds of tests on which a mutant then survives")
    add("--rest", action="store_true", help="then the rest of the suite on each survivor")
    add("--without", action="append", default=[], help="test files with this in their name are not used; repeatable")
    add("--coverage", action="store_true", help="measure anew which tests reach which line, no mutants")
    add("--report", action="store_true", help="only the report of what has been run")
    given = parser.parse_args()
    HOME.mkdir(parents=True, exist_ok=True)
    if given.report:
        write_report(sample(ROOT, given), given.seed)
        return
    import_heavy()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of the `finally` below
    trees = [copy_checkout(ROOT) for _ in range(given.jobs)]
    try:
        chosen = sample(trees[0], given)
        reach = reaches(trees, HOME / "reach", given.coverage, given.without)
        if not given.coverage:
            done = {result.key for result in results()}
            run([mutation for mutation in chosen if mutation.key not in done], reach, trees, given)
            write_report(chosen, given.seed)
    finally:
        for tree in trees:
            shutil.rmtree(tree.parent)


def sample(root: Path, given: argparse.Namespace) -> list[Mutation]:
    """The mutants of a seed, of the modules that are asked for."""
    asked = [module.rstrip("/") for module in given.module]
    texts = population(root)
    lines = {path: text.count("\n") for path, text in texts.items() if not asked or _within(path, asked)}

    def counts(mutation: Mutation) -> bool:
        return changes_behaviour(texts[mutation.path], mutated(texts[mutation.path], mutation))

    return list(islice(draw(lines, given.seed, lambda path: mutations(path, texts[path]), counts), given.count))


def _within(path: str, places: Sequence[str]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)


def results() -> list[Result]:
    """What has been run, the last word on each mutant."""
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    found = [Result(**json.loads(line)) for line in lines]
    return list({result.key: result for result in found}.values())


def write_report(chosen: Sequence[Mutation], seed: int) -> None:
    """Into the folder of the runs, and on the terminal."""
    keys = {mutation.key for mutation in chosen}
    finished = [result for result in results() if result.key in keys]
    text = report(finished, f"{len(finished)} of {len(chosen)} mutants, seed {seed}")
    (HOME / "report.md").write_text(text)
    print(text)


def run(chosen: Sequence[Mutation], reach: Sequence[Reach], trees: Sequence[Path], given: argparse.Namespace) -> None:
    """Run mutants, one in each tree at a time, and write down each as it ends."""
    left, busy = list(chosen), dict[Path, Generator[None, None, Result]]()
    while left or busy:
        for tree in trees:
            if tree not in busy and left:
                busy[tree] = judge(left.pop(0), reach, tree, given)
            if tree in busy:
                try:
                    next(busy[tree])
                except StopIteration as end:
                    del busy[tree]
                    _keep(end.value, to_go=len(left) + len(busy))
        time.sleep(0.05)


def judge(
    mutation: Mutation, reach: Sequence[Reach], tree: Path, given: argparse.Namespace
) -> Generator[None, None, Result]:
    """Put one mutation into a tree and run its tests, with a break after every look at them."""
    began, ran, outcome, killer = time.monotonic(), 0, "survived", ""
    text = (tree / mutation.path).read_text()
    changed = mutated(text, mutation)
    sources = {one.file: (tree / one.file).read_text() for one in reach}
    lines = statement(text, mutation.line, mutation.last_line)
    reaching = batches(reach, mutation.path, lines, sources)
    planned = within(reaching, given.budget)
    if not reaching:
        planned, outcome = [unreached(reach)], "uncovered"
    if given.rest:
        planned += others(reach, planned)
    (tree / mutation.path).write_text(changed)
    for batch in planned:
        options = ["-x", f"--timeout={batch.patience:.0f}"]
        with Fork(tree, batch.tests, options, max(given.timeout, 3 * batch.seconds)) as fork:
            while (code := fork.ended()) is None:
                yield
        ran += len(batch.tests.order)
        if code not in PASSED:
            killer = _killer(fork.log.read_text(errors="replace"))
            outcome = "hung" if code == "hung" or "Timeout (>" in killer else "killed"
            break
    (tree / mutation.path).write_text(text)
    seconds = round(time.monotonic() - began, 1)
    diff = difflib.unified_diff(text.splitlines(), changed.splitlines(), mutation.path, mutation.path, lineterm="", n=2)
    left = max(0, sum(len(batch.tests.order) for batch in reaching) - ran)
    return Result(mutation.key, mutation.path, mutation.line, outcome, seconds, ran, left, killer, "\n".join(diff))


def _killer(log: str) -> str:
    """The test that failed, or the log's end where pytest did not get as far as a test."""
    found = re.search(r"^(?:FAILED|ERROR) (.*)$", log, re.MULTILINE)
    return found[1][:300] if found else log[-300:]


def _keep(result: Result, to_go: int) -> None:
    with RESULTS.open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")
    print(f"{to_go} to go. {result.outcome} in {result.seconds} s, {result.tests} tests: ", end="")
    print(f"{result.path}:{result.line} {result.killer}", flush=True)


if __name__ == "__main__":
    main()
