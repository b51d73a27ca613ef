"""Two checkouts side by side, the second over the first. `slipstream bench before --checkouts OLD NEW`

Each is a process of its own with one thread; they take turns, one run each, and what counts is the CPU time that a
process used, so that others may compute beside it. The bare diffusers call is the same in both: how far its ratio is
from one is what the machine does to the others. With `--pictures` it compares final latents and pictures of every
acceleration bit for bit instead.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

from tests.bench.harness import ROOT, Spread, note, options
from tests.bench.report import Report

WORK = ("diffusers", "one request", "engine", "16 mixed")


class Checkout:
    """A process in one checkout."""

    def __init__(self, folder: Path) -> None:
        self.commit = subprocess.run(
            ["git", "log", "-1", "--format=%h %s"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        # -P: modules come from that checkout, and not from the folder of the worker's file
        command = [sys.executable, "-P", str(ROOT / "tests" / "bench" / "before_worker.py")]
        environment = {**os.environ, "PYTHONPATH": str(folder.resolve())}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True)

    def ask(self, do: str, model: str, dtype: str, work: str) -> Any:
        """The worker's answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"do": do, "model": model, "dtype": dtype, "work": work}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError("a worker ended")

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def timed(old: Checkout, new: Checkout, case: tuple[str, str, str], rounds: int) -> dict[str, object]:
    """CPU time of both, round by round, the first to go changing; what both dispatch and copy."""
    seconds: dict[Checkout, list[float]] = {old: [], new: []}
    for checkout in (old, new):
        checkout.ask("time", *case)
    for number in range(rounds):
        for checkout in (old, new) if number % 2 else (new, old):
            seconds[checkout].append(checkout.ask("time", *case))
    ratio = Spread.of([mine / theirs for mine, theirs in zip(seconds[new], seconds[old], strict=True)])
    medians = {checkout: Spread.of(times).median for checkout, times in seconds.items()}
    row = {
        **dict(zip(("model", "dtype", "work"), case, strict=True)),
        "old ms": 1000 * medians[old],
        "new ms": 1000 * medians[new],
        "new over old": ratio,
        "of the medians": f"{medians[new] / medians[old]:.3f}",
        "of the fastest": f"{min(seconds[new]) / min(seconds[old]):.3f}",
    }
    if case[2] in ("one request", "16 mixed"):
        counts = [checkout.ask("count", *case) for checkout in (old, new)]
        row |= {"operators": f"{counts[1]['operators']} / {counts[0]['operators']}"}
        row |= {"MB copied": f"{counts[1]['bytes copied'] / 1e6:.0f} / {counts[0]['bytes copied'] / 1e6:.0f}"}
    note(str(row))
    return row


def main() -> None:
    """Time, or compare pictures."""
    given = options(
        __doc__,
        checkouts=[Path(".")],
        models=["shapes-sd", "shapes-dit"],
        dtypes=["float32", "bfloat16"],
        work=list(WORK),
        pictures=False,
    )
    if len(given.checkouts) != 2:
        raise SystemExit("--checkouts takes two folders, the old one first")
    old, new = (Checkout(folder) for folder in given.checkouts)
    try:
        if given.pictures:
            report = Report("before-pictures", "The same pictures in two checkouts, float32, bit for bit", given)
            rows: list[dict[str, object]] = []
            for model in given.models:
                for acceleration in new.ask("list", model, "", ""):
                    one, other = (each.ask("look", model, "float32", acceleration) for each in (old, new))
                    same = ["equal" if a == b else "different" for a, b in zip(one, other, strict=True)]
                    rows.append({"model": model, "acceleration": acceleration, "latents": same[0], "pixels": same[1]})
            report.table("25 DDIM steps, two images", rows)
        else:
            report = Report("before", "CPU time of two checkouts, one thread", given)
            rounds = given.rounds or (1 if given.quick else 15)
            cases = product(given.models, given.dtypes, given.work)
            report.table("New over old", [timed(old, new, case, rounds) for case in cases])
        report.remark(f"Old: {old.commit}. New: {new.commit}.")
        report.save()
    finally:
        old.close()
        new.close()


if __name__ == "__main__":
    main()
