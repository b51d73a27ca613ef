"""Which settings make a CPU service fastest: threads, malloc, memory format, precision. `slipstream bench cpu`

Every setting is a process of its own, all alive side by side; they take turns, one measurement each. So no setting may
compute while it waits: `OMP_WAIT_POLICY=ACTIVE` is not among them, it spins on a core for as long as it lives.
"""

from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from tests.bench import zoo
from tests.bench.harness import ROOT, Spread, note, options
from tests.bench.report import Report, bars

GLIBC = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**31),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""glibc keeps freed memory in place of handing it back to the system after every operator."""
BASE = "as torch comes"
WORK = {
    "shapes-sd": (("tick", 1), ("tick", 8), ("decode", 1), ("decode", 4)),
    "shapes-dit": (("tick", 1), ("tick", 8)),
    "unet-65m": (("tick", 1), ("decode", 1)),
    "pixart-69m": (("tick", 1),),
}


@dataclass(frozen=True)
class Setting:
    """Flags of the worker and variables of its environment."""

    flags: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def settings(threads: bool) -> dict[str, Setting]:
    """What is compared, with or without numbers of threads; jemalloc where the system has it."""
    network, vae = ("--network-format", "channels_last"), ("--vae-format", "channels_last")
    half = ("--dtype", "bfloat16")
    found = {
        BASE: Setting(),
        "glibc thresholds": Setting((), GLIBC),
        "glibc thresholds, one arena": Setting((), {**GLIBC, "MALLOC_ARENA_MAX": "1"}),
        "channels_last": Setting((*network, *vae)),
        "bf16": Setting(half),
        "bf16, channels_last": Setting((*half, *network, *vae)),
        "glibc thresholds, channels_last": Setting((*network, *vae), GLIBC),
        "glibc thresholds, bf16, channels_last": Setting((*half, *network, *vae), GLIBC),
    }
    if threads:
        found |= {
            "1 thread": Setting(("--threads", "1")),
            "twice the threads": Setting(("--threads", str(2 * (os.cpu_count() or 1)))),
        }
    if library := _jemalloc():
        found["jemalloc"] = Setting((), {"LD_PRELOAD": library})
        found["jemalloc, channels_last"] = Setting((*network, *vae), {"LD_PRELOAD": library})
    return found


def _jemalloc() -> str | None:
    name = ctypes.util.find_library("jemalloc")
    folders = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")
    places = (Path(folder) / name for folder in folders if name)
    return next((str(place) for place in places if place.is_file()), None)


class Worker:
    """A process under one setting."""

    def __init__(self, setting: Setting) -> None:
        command = [sys.executable, "-m", "tests.bench.cpu_worker", *setting.flags]
        environment = {**os.environ, **setting.environment}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )

    def ready(self) -> None:
        """Wait until it has started."""
        self._line()

    def seconds(self, model: str, work: str, count: int) -> float:
        """The time of one piece of work."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{model} {work} {count}\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        """End it."""
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a worker ended")
        return line.strip()


Pieces = dict[tuple[str, str, int], dict[str, Spread]]


def measure(names: list[str], chosen: dict[str, Setting], rounds: int) -> Pieces:
    """Every setting's time over that of `BASE`, round by round, for each piece of work."""
    workers = {}
    try:
        for label, setting in chosen.items():
            workers[label] = Worker(setting)
            workers[label].ready()
        found: Pieces = {}
        for name in names:
            for work, count in WORK[name]:
                small = name in zoo.SMALL
                for worker in workers.values():
                    worker.seconds(name, work, count)
                samples: dict[str, list[float]] = {label: [] for label in workers}
                for _ in range(rounds if small else max(2, rounds // 2)):
                    for label, worker in workers.items():
                        # The first call after a pause wakes threads and caches; what counts is the best of a few.
                        samples[label].append(min(worker.seconds(name, work, count) for _ in range(3 if small else 2)))
                ratios = {
                    label: Spread.of([mine / base for mine, base in zip(values, samples[BASE], strict=True)])
                    for label, values in samples.items()
                }
                found[name, work, count] = ratios
                note(f"{name} {work} {count}: {1000 * Spread.of(samples[BASE]).median:.1f} ms {BASE}")
        return found
    finally:
        for worker in workers.values():
            worker.close()


def main() -> None:
    """Compare, and name the fastest."""
    given = options(__doc__, models=[*zoo.SMALL, *zoo.LARGE])
    report = Report("cpu", f"Time over '{BASE}'", given)
    chosen = settings(threads=given.clock == "wall")
    if given.quick:
        chosen = {label: chosen[label] for label in (BASE, "glibc thresholds", "bf16, channels_last")}
    names = list(zoo.names(given))
    for name in names:
        zoo.place(name)
    found = measure(names, chosen, given.rounds or (1 if given.quick else 6))
    columns = {" ".join(map(str, piece)): spreads for piece, spreads in found.items()}
    rows = [{"setting": label, **{column: spreads[label] for column, spreads in columns.items()}} for label in chosen]
    report.table("Smaller is faster", rows)
    for (name, work, count), spreads in found.items():
        fastest = min(spreads, key=lambda label: spreads[label].median)
        report.remark(f"{name} {work} {count}: fastest with {fastest}, {spreads[fastest]}.")

    def draw(figure: Figure) -> None:
        for axes, (key, spreads) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
            bars(axes, list(spreads), list(spreads.values()), 1.0)
            axes.set_title(" ".join(map(str, key)), fontsize=9)

    report.save(draw, (3 * len(found) + 2, 3.5))


if __name__ == "__main__":
    main()
