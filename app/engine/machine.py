"""What the machine has for this process: cores by affinity and cgroup quota, and how many of them others use."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Threads:
    """How many threads an operator is to have, and why."""

    count: int
    reason: str


def choose_threads(most: int, root: Path = Path("/"), allowed: int | None = None, host: int | None = None) -> Threads:
    """Threads for operators: as many as cores are free, `most` at the most and one at least.

    More threads than free cores wait for one another at the end of every operator, which costs far more than they save.
    `root` holds /proc and /sys; `allowed` are the cores that this process may run on, `host` those of the machine.
    """
    allowed = len(os.sched_getaffinity(0)) if allowed is None else allowed
    host = (os.cpu_count() or allowed) if host is None else host
    quota, load = cgroup_cores(root), load_average(root)
    limits = {f"torch's own choice is {most}": float(most), f"{allowed} cores may be used": float(allowed)}
    if quota is not None:
        limits[f"the cgroup's quota is {quota:g} cores"] = quota
    limits[f"the load of {load:.1f} leaves {max(0.0, host - load):.1f} of {host} cores free"] = host - load
    # A load of some tenths is this process itself, starting.
    count = {reason: max(1, int(limit + 0.5)) for reason, limit in limits.items()}
    reason = min(count, key=count.__getitem__)
    return Threads(count[reason], reason)


def cgroup_cores(root: Path = Path("/")) -> float | None:
    """The cores that the cgroup's quota is worth, of version 2 or 1; None where there is none."""
    folder = root / "sys/fs/cgroup"
    unified = _words(folder / "cpu.max")
    if len(unified) == 2 and unified[0] != "max":
        return _ratio(*unified)
    quota, period = _words(folder / "cpu/cpu.cfs_quota_us"), _words(folder / "cpu/cpu.cfs_period_us")
    if quota and period and not quota[0].startswith("-"):
        return _ratio(quota[0], period[0])
    return None


def load_average(root: Path = Path("/")) -> float:
    """Threads that ran or wanted to, over the last minute, on the whole machine; 0 where it is not known."""
    words = _words(root / "proc/loadavg")
    try:
        return float(words[0])
    except (IndexError, ValueError):
        return 0.0


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _ratio(quota: str, period: str) -> float | None:
    try:
        return float(quota) / float(period)
    except (ValueError, ZeroDivisionError):
        return None
