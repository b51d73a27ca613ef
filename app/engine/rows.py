"""How many rows a tick of a model may have: from trials at the start, then from the ticks that it serves."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from pathlib import Path

from app.engine.pace import pays
from app.logs import SERVER

REVIEW_TICKS = 512
"""Measured ticks between two looks at what rows cost."""
LEAST_TICKS = 8
"""Ticks of about so many rows that tell what a row costs there."""
TRIAL_TICKS = 64
"""Full ticks after which one may have twice the rows, so that what more would cost does not stay a belief."""
FILE = "rows.json"
MOST_KEPT = 64
"""Models, machines and versions whose measurements a file keeps."""


class Rows:
    """The cap of one model. A tick counts at the largest power of two that is not above its rows.

    At a review the median of what was measured since the last takes the place of what was known. Numbers of rows that
    did not come up change as the others did on the whole: a machine that is slower now is slower for all.
    """

    def __init__(self, costs: Mapping[int, float], keep: Callable[[Mapping[int, float]], None]) -> None:
        """`costs` are seconds a row in ticks of 2, 4, 8 ... rows; `keep` is given them after every review."""
        self.costs = dict(costs)
        self.cap = pays(self.costs)
        self._keep = keep
        self._seen: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=REVIEW_TICKS))
        self._ticks = 0
        self._full = 0

    def observe(self, rows: int, seconds: float) -> int:
        """Learn from a tick; the cap of the next."""
        number = 2 ** (max(2, rows).bit_length() - 1)
        self._seen[number].append(seconds / rows)
        self._ticks += 1
        self._full += rows >= self.cap
        if self._ticks >= REVIEW_TICKS:
            self._review()
        if self._full >= TRIAL_TICKS:
            self._full = 0
            return min(2 * self.cap, max(self.costs))
        return self.cap

    def _review(self) -> None:
        found = {
            number: statistics.median(times)
            for number, times in self._seen.items()
            if number in self.costs and len(times) >= LEAST_TICKS
        }
        self._ticks = 0
        self._seen.clear()
        if not found:
            return
        slower = statistics.median(cost / self.costs[number] for number, cost in found.items())
        self.costs = {number: found.get(number, slower * cost) for number, cost in self.costs.items()}
        self.cap = pays(self.costs)
        self._keep(self.costs)


def said(costs: Mapping[int, float]) -> str:
    """What a row costs, for the log."""
    return ", ".join(f"{1000 * cost:.3g} at {number}" for number, cost in costs.items())


class Kept:
    """What was measured, in a file of the data directory: the next start begins where this one ended."""

    def __init__(self, folder: Path | None) -> None:
        """Without a folder nothing is kept."""
        self._file = None if folder is None else folder / FILE

    def read(self, key: str) -> dict[int, float] | None:
        """The costs of a row that were kept under this key. What is damaged is measured anew."""
        try:
            found = {int(number): float(cost) for number, cost in self._all()[key].items()}
        except (KeyError, ValueError, AttributeError, TypeError):
            return None
        numbers = [2**i for i in range(1, len(found) + 1)]
        return found if found and list(found) == numbers and all(0 < cost < 3600 for cost in found.values()) else None

    def write(self, key: str, costs: Mapping[int, float]) -> None:
        """Keep the costs of a row. A disk that does not take them is no reason to stop."""
        if self._file is None:
            return
        all_of_them = self._all()
        all_of_them.pop(key, None)
        kept = dict([*all_of_them.items(), (key, {str(number): cost for number, cost in costs.items()})][-MOST_KEPT:])
        half = self._file.with_suffix(".half")
        try:
            half.write_text(json.dumps(kept, indent=1))
            half.replace(self._file)
        except OSError as error:
            SERVER.warning("what rows cost could not be kept in %s: %s", self._file, error.strerror)

    def _all(self) -> dict[str, dict[str, float]]:
        try:
            found = json.loads(self._file.read_text()) if self._file is not None else {}
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}
