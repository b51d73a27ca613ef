"""Results as JSON, a Markdown table and a PNG plot, each with the machine, the date and the command."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tests.bench.harness import Spread, command, machine, note

Row = Mapping[str, object]
COLOURS = ("#33425b", "#f2c14e", "#4d9078", "#f78154", "#b4436c", "#5fa8d3", "#8d99ae", "#a06cd5", "#7a5c3e")


class Report:
    """What one benchmark found: tables, remarks and at most one figure."""

    def __init__(self, name: str, title: str, options: argparse.Namespace) -> None:
        self._name = name
        self._title = title
        self._quick: bool = options.quick
        self._folder: Path = options.output
        self._began = time.time()
        self._tables: list[tuple[str, list[Row]]] = []
        self._remarks: list[str] = []
        self._machine = machine()

    def table(self, title: str, rows: Sequence[Row]) -> None:
        """Add a table, or put it in the place of the one with this title; all rows have the keys of the first."""
        self._tables = [(name, known) for name, known in self._tables if name != title]
        self._tables.append((title, list(rows)))
        note(f"{title}\n{markdown(rows)}")
        self.save()  # what a run that is cut short leaves behind

    def remark(self, text: str) -> None:
        """Add a sentence."""
        self._remarks.append(text)
        note(text)

    def save(self, draw: Callable[[Figure], None] | None = None, size: tuple[float, float] = (9, 4.5)) -> Path:
        """Write everything and return the JSON file's path."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._name}.json"
        facts = {
            "name": self._name,
            "title": self._title,
            "quick": self._quick,
            "command": command(),
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self._began)),
            "seconds": round(time.time() - self._began),
            "machine": self._machine,
        }
        tables = [{"title": title, "rows": rows} for title, rows in self._tables]
        path.write_text(json.dumps({**facts, "tables": tables, "remarks": self._remarks}, indent=2, default=_plain))
        path.with_suffix(".md").write_text(self._markdown(facts))
        if draw is not None:
            figure = Figure(figsize=size, layout="constrained")
            draw(figure)
            figure.suptitle(self._title + (" (quick: means nothing)" if self._quick else ""), fontsize=11)
            figure.savefig(path.with_suffix(".png"), dpi=120)
        note(f"wrote {path.with_suffix('')}.json, .md" + ("" if draw is None else ", .png"))
        return path

    def _markdown(self, facts: Mapping[str, Any]) -> str:
        about = ", ".join(f"{key} {value}" for key, value in facts["machine"].items())
        head = [f"# {self._title}", f"`{facts['command']}`, {facts['date']}, {facts['seconds']} s. Machine: {about}."]
        if self._quick:
            head.append("**A quick run: these figures mean nothing.**")
        body = [f"## {title}\n\n{markdown(rows)}" for title, rows in self._tables]
        return "\n\n".join([*head, *body, *self._remarks]) + "\n"


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    if not rows:
        return "(nothing)"
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in rows[0]) + " |" for row in rows]
    return "\n".join(lines)


def bars(axes: Any, labels: Sequence[str], values: Sequence[Spread | float], target: float | None = None) -> None:
    """Horizontal bars with quartiles, first label on top, and a dashed line at the target."""
    spreads = [value if isinstance(value, Spread) else Spread(value, value, value, 1) for value in values]
    middles = [s.median for s in spreads]
    errors = [[max(s.median - s.low, 0) for s in spreads], [max(s.high - s.median, 0) for s in spreads]]
    axes.barh(labels, middles, xerr=errors, color=COLOURS[0], height=0.65, error_kw={"ecolor": COLOURS[3]})
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    if target is not None:
        axes.axvline(target, color=COLOURS[4], linestyle="--", linewidth=1, label=f"target {target:g}")
        axes.legend(fontsize=8, loc="lower right")


def lines(axes: Any, series: Mapping[str, Mapping[float, float]], x: str, y: str, log: str = "") -> None:
    """One line a series, over x; `log` names the logarithmic axes."""
    for colour, (label, points) in zip(COLOURS * 3, series.items(), strict=False):
        axes.plot(list(points), list(points.values()), marker="o", markersize=3, color=colour, label=label)
    axes.set(xlabel=x, ylabel=y)
    if "x" in log:
        axes.set_xscale("log", base=2)
    if "y" in log:
        axes.set_yscale("log")
    axes.set_ylim(bottom=None if "y" in log else 0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def _plain(value: object) -> object:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)
