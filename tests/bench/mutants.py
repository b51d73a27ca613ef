"""Mutation run: small faults are put into a copy of the code, one at a time; do the tests notice? `pip install ".[test,bench]"`

    python -m tests.bench.mutants --count 100 --seed 7 --jobs 2     goes on where it stopped; writes runs/mutants/report.md
    python -m tests.bench.mutants --module app/batcher.py           mutants of one file
    python -m tests.bench.mutants --report                          the report again, from what has been run
    python -m tests.bench.mutants --coverage                        only measures anew which tests reach which line

The mutations are cosmic-ray's: operators, comparisons, numbers, conditions, loops, exceptions, decorators. Of `app` and
`models`, without training, distilling and the shapes, all count but those that nothing could notice: in docstrings and
annotations (calls inside an annotation are read by pydantic and stay), in `__all__`, in blocks for type checkers, in
decorators for type checkers, and where the result is no Python. No operator changes a string, so messages stay as they are.

A mutant meets first the tests that run its line, the fastest first, then the rest of the files that reach it by an import,
by a fixture or in a process that they start, for `--budget` seconds; with `--rest` the rest of the suite too. It is
killed by the first failure. A run that hangs is ended and counts as killed. On lines that no test reaches the tests of the
command line and of the server process are tried. Which tests reach a line is measured once, test file by test file, kept
under runs/mutants/reach, and measured anew for the files that rest on something that has changed.

Each job has a copy of the checkout in a temporary folder, so the checkout may be worked on meanwhile; torch and the like
are imported once and every run is a fork of that process.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from tests.bench.mutant_draw import Mutation, changes_behaviour, draw, mutated, mutations, population
from tests.bench.mutant_reach import UNREACHED, Batch, Reach, batches, others, reaches, statement
from tests.bench.mutant_report import Result, report
from tests.bench.mutant_runs import ROOT, Fork, Tests, copy_checkout, import_heavy

HOME = ROOT / "runs" / "mutants"
PASSED = {0, 5}
"""Exit codes of pytest: all passed, or the mutation left no test of these."""


def main() -> None:
    """Measure, draw, run, report, as the options say."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.mutants", description=(__doc__ or "").split(" `")[0])
    parser.add_argument(
        "--count", type=int, default=100, help="mutants; more of the same seed are the same and then others"
    )
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--module", action="append", help="only mutants of this file; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a run of tests hangs")
    parser.add_argument(
        "--budget", type=float, default=240, help="seconds of tests a mutant, on which it then survives"
    )
    parser.add_argument("--rest", action="store_true", help="then the rest of the suite on each survivor")
    parser.add_argument("--coverage", action="store_true", help="measure anew which tests reach which line, no mutants")
    parser.add_argument("--report", action="store_true", help="only the report of what has been run")
    given = parser.parse_args()
    kept = HOME / "results.jsonl"
    texts = population(ROOT)
    known = {path: texts[path] for path in given.module or texts}
    chosen = sample(known, given.count, given.seed)
    if not given.report:
        import_heavy()
        HOME.mkdir(parents=True, exist_ok=True)
        trees = [copy_checkout(ROOT) for _ in range(given.jobs)]
        try:
            reach = reaches(ROOT, trees[0], HOME / "reach", given.coverage)
            if not given.coverage:
                done = {result.key for result in results(kept)}
                run([mutation for mutation in chosen if mutation.key not in done], texts, reach, trees, kept, given)
        finally:
            for tree in trees:
                shutil.rmtree(tree.parent)
    keys = {mutation.key: rank for rank, mutation in enumerate(chosen)}
    finished = [result for result in results(kept) if result.key in keys]
    text = report(finished, f"{len(finished)} of {len(chosen)} mutants, seed {given.seed}")
    HOME.mkdir(parents=True, exist_ok=True)
    (HOME / "report.md").write_text(text)
    print(text)


def sample(texts: Mapping[str, str], count: int, seed: int) -> list[Mutation]:
    """The mutants of a seed."""
    lines = {path: text.count("\n") for path, text in texts.items()}

    def counts(mutation: Mutation) -> bool:
        return changes_behaviour(texts[mutation.path], mutated(texts[mutation.path], mutation))

    return list(islice(draw(lines, seed, lambda path: mutations(path, texts[path]), counts), count))


def results(kept: Path) -> list[Result]:
    """What has been run, the last word on each mutant."""
    lines = kept.read_text().splitlines() if kept.is_file() else []
    found = [Result(**json.loads(line)) for line in lines]
    return list({result.key: result for result in found}.values())


def run(
    chosen: Sequence[Mutation],
    texts: Mapping[str, str],
    reach: Sequence[Reach],
    trees: Sequence[Path],
    kept: Path,
    given: argparse.Namespace,
) -> None:
    """Run mutants, one in each tree at a time, and write down each as it ends."""
    left, busy = list(chosen), dict[Path, Generator[None, None, Result]]()
    while left or busy:
        for tree in trees:
            if tree not in busy and left:
                mutation = left.pop(0)
                busy[tree] = judge(mutation, texts[mutation.path], reach, tree, given)
            if tree in busy:
                try:
                    next(busy[tree])
                except StopIteration as end:
                    del busy[tree]
                    _keep(end.value, kept)
                    print(f"{len(left) + len(busy)} to go", flush=True)
        time.sleep(0.05)


def judge(
    mutation: Mutation, text: str, reach: Sequence[Reach], tree: Path, given: argparse.Namespace
) -> Generator[None, None, Result]:
    """Put one mutation into a tree and run its tests, with a break after every look at them."""
    began, changed, ran, outcome, killer = time.monotonic(), mutated(text, mutation), 0, "survived", ""
    sources = {one.file: (tree / one.file).read_text() for one in reach}
    lines = statement(text, mutation.line, mutation.last_line)
    planned = batches(reach, mutation.path, lines, sources, given.budget)
    if not planned:
        planned, outcome = [Batch(Tests([file for file in UNREACHED if (tree / file).is_file()]))], "uncovered"
    if given.rest:
        planned += others(reach, planned)
    (tree / mutation.path).write_text(changed)
    for batch in planned:
        fork = Fork(tree, batch.tests, ["-x", f"--timeout={batch.patience:.0f}"], max(given.timeout, 3 * batch.seconds))
        while (code := fork.ended()) is None:
            yield
        ran += len(batch.tests.order or ())
        if code not in PASSED:
            killer = _killer(fork.log.read_text(errors="replace"))
            outcome = "hung" if code == "hung" or "Timeout (>" in killer else "killed"
            break
    (tree / mutation.path).write_text(text)
    seconds = round(time.monotonic() - began, 1)
    diff = difflib.unified_diff(text.splitlines(), changed.splitlines(), mutation.path, mutation.path, lineterm="", n=2)
    return Result(mutation.key, mutation.path, mutation.line, outcome, seconds, ran, killer, "\n".join(diff))


def _killer(log: str) -> str:
    """The test that failed, or the log's end where pytest did not get as far as a test."""
    found = re.search(r"^(?:FAILED|ERROR) (.*)$", log, re.MULTILINE)
    return found[1][:300] if found else log[-300:]


def _keep(result: Result, kept: Path) -> None:
    with kept.open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")
    print(f"{result.outcome} in {result.seconds} s, {result.tests} tests: {result.path}:{result.line} {result.killer}")


if __name__ == "__main__":
    main()
