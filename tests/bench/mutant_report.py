"""What the tests made of the mutants, by module. `python -m tests.bench.mutants --report`"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

CORE = ("app/engine*", "models/*")
NOT_CORE = ("models/quality/*", "models/search/*", "models/costs/*")
COLUMNS = ("killed", "survived", "hung", "uncovered")
"""hung: a test had to be ended, which counts as killed. uncovered: no test is known to reach the line, none failed."""


@dataclass(frozen=True)
class Result:
    """One mutant."""

    key: str
    path: str
    line: int
    outcome: str
    seconds: float
    tests: int
    """In the runs up to the last one; of that, those after the first failure did not run."""
    left: int
    """Tests that reach the line too, and were not run."""
    killer: str
    diff: str

    @property
    def caught(self) -> bool:
        """Whether a test noticed."""
        return self.outcome in {"killed", "hung"}


def core(path: str) -> bool:
    """Whether a file belongs to the engine, the models or the accelerators, not to searches, counts and evaluation."""
    return any(fnmatch(path, glob) for glob in CORE) and not any(fnmatch(path, glob) for glob in NOT_CORE)


def table(results: Sequence[Result]) -> str:
    """Rows by module, then the core, then all."""
    lines = ["| module | mutants | " + " | ".join(COLUMNS) + " | % killed |", "| --- " + "| --: " * 6 + "|"]
    for path in sorted({result.path for result in results}):
        lines += [_row(f"`{path}`", [result for result in results if result.path == path])]
    lines += [_row("**engine, models, accelerators**", [result for result in results if core(result.path)])]
    lines += [_row("**all**", results)]
    return "\n".join(lines)


def _row(name: str, results: Sequence[Result]) -> str:
    counted = Counter(result.outcome for result in results)
    total, caught = counted.total(), counted["killed"] + counted["hung"]
    share = f"{100 * caught / total:.0f}" if total else "-"
    return f"| {name} | {total} | " + " | ".join(str(counted[column]) for column in COLUMNS) + f" | {share} |"


def report(results: Sequence[Result], title: str) -> str:
    """The table, and what survived as diffs."""
    survivors = sorted(
        (result for result in results if not result.caught), key=lambda result: (result.path, result.line)
    )
    parts = [f"# {title}", table(results), "hung counts as killed.", f"## Survivors ({len(survivors)})"]
    for one in survivors:
        ran = f"{one.outcome}, {one.tests} tests" + (f", {one.left} more reach it" if one.left else "")
        parts += [f"### {one.path}:{one.line} ({ran})", f"```diff\n{one.diff}\n```"]
    return "\n\n".join(parts) + "\n"
