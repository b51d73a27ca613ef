"""Timing side by side: contenders take turns, round after round, so that what else the machine does hits all alike."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
Contender = Callable[[], object]
CLOCK = "SLIPSTREAM_BENCH_CLOCK"


@dataclass(frozen=True)
class Spread:
    """The median of `count` measurements and their quartiles."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"

    def times(self, factor: float) -> Spread:
        """In another unit."""
        return Spread(self.median * factor, self.low * factor, self.high * factor, self.count)


@dataclass(frozen=True)
class Race:
    """Seconds of every contender in every round."""

    seconds: Mapping[str, Sequence[float]]

    def time(self, name: str) -> Spread:
        """Seconds of one contender."""
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, over: str) -> Spread:
        """One contender's time over another's, round by round: both ran within moments of each other."""
        pairs = zip(self.seconds[name], self.seconds[over], strict=True)
        return Spread.of([mine / theirs for mine, theirs in pairs])


def race(contenders: Mapping[str, Contender], rounds: int, warmup: int = 1) -> Race:
    """Run every contender `warmup` times untimed, then once a round; each round begins with the next of them."""
    for _ in range(warmup):
        for run in contenders.values():
            run()
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(elapsed(contenders[name]))
    return Race(seconds)


def clock() -> float:
    """Seconds on the clock of this run: the wall's, or with `--clock cpu` what this process has computed."""
    return time.process_time() if os.environ.get(CLOCK) == "cpu" else time.perf_counter()


def elapsed(run: Contender) -> float:
    """Seconds of one call."""
    began = clock()
    run()
    return clock() - began


def options(title: str, argv: Sequence[str] | None = None, **flags: object) -> argparse.Namespace:
    """The command line of a benchmark. `flags` are its own, by name, with their defaults (False makes a switch)."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--quick", action="store_true", help="a smoke run: tiny sizes, figures that mean nothing")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of measuring; 0: the benchmark's own")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "bench", help="where the results go")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: where others compute too; one thread",
    )
    for name, default in flags.items():
        flag = "--" + name.replace("_", "-")
        if default is False:
            parser.add_argument(flag, action="store_true")
        elif isinstance(default, list):
            parser.add_argument(flag, nargs="+", default=default, type=type(default[0]), help=f"default {default}")
        else:
            parser.add_argument(flag, default=default, type=type(default), help=f"default {default}")
    given = parser.parse_args(argv)
    os.environ[CLOCK] = given.clock  # worker processes have it too
    if given.clock == "cpu":
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
    return given


def note(text: str) -> None:
    """Say on standard error what is going on."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


@cache
def machine() -> dict[str, object]:
    """What ran: processor, memory, threads, load before the run, versions, commit."""
    facts: dict[str, object] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": torch.get_num_threads(),
        "clock": os.environ.get(CLOCK, "wall"),
        "load_before": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain", "-uno") else ""),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    for package in ("torch", "diffusers", "transformers", "peft", "DeepCache", "cache-dit"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def command() -> str:
    """The command line that repeats this run."""
    name = Path(sys.argv[0]).stem
    return shlex.join(["slipstream", "bench", name.removeprefix("bench_"), *sys.argv[1:]])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    lines = (line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name"))
    return next(lines, platform.machine())


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or ""


def quiet() -> None:
    """Let no library talk: progress bars and notices are no part of a measurement."""
    import diffusers
    import transformers

    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    warnings.simplefilter("ignore")
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
