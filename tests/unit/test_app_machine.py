"""How many threads an operator is given: by the files of a machine that is made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.engine.machine import cgroup_cores, choose_threads, load_average


def machine(root: Path, **files: str) -> Path:
    """A root folder with these files."""
    places = {
        "max": "sys/fs/cgroup/cpu.max",
        "quota": "sys/fs/cgroup/cpu/cpu.cfs_quota_us",
        "period": "sys/fs/cgroup/cpu/cpu.cfs_period_us",
        "load": "proc/loadavg",
    }
    for name, text in files.items():
        path = root / places[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"max": "max 100000\n"}, None),
        ({"max": "150000 100000\n"}, 1.5),
        ({"max": "nonsense\n"}, None),
        ({"quota": "-1\n", "period": "100000\n"}, None),
        ({"quota": "50000\n", "period": "100000\n"}, 0.5),
        ({"quota": "50000\n", "period": "0\n"}, None),
    ],
)
def test_the_quota_of_either_cgroup(tmp_path: Path, files: dict[str, str], cores: float | None) -> None:
    assert cgroup_cores(machine(tmp_path, **files)) == cores


@pytest.mark.parametrize(("text", "load"), [("2.31 1.00 0.50 3/400 1234\n", 2.31), ("", 0.0), ("x y z\n", 0.0)])
def test_the_load(tmp_path: Path, text: str, load: float) -> None:
    assert load_average(machine(tmp_path, load=text)) == load
    assert load_average(tmp_path / "elsewhere") == 0.0


@pytest.mark.parametrize(
    ("most", "allowed", "host", "files", "count", "why"),
    [
        (8, 16, 16, {"load": "0.4"}, 8, "torch's own choice is 8"),
        (8, 4, 16, {"load": "0.4"}, 4, "4 cores may be used"),
        (8, 16, 16, {"load": "0.4", "max": "200000 100000"}, 2, "the cgroup's quota is 2 cores"),
        (8, 16, 16, {"load": "0.4", "max": "20000 100000"}, 1, "the cgroup's quota is 0.2 cores"),
        (8, 16, 16, {"load": "11.0"}, 5, "the load of 11.0 leaves 5.0 of 16 cores free"),
        (2, 2, 2, {"load": "1.1"}, 1, "the load of 1.1 leaves 0.9 of 2 cores free"),  # one neighbour
        (2, 2, 2, {"load": "9.0"}, 1, "the load of 9.0 leaves 0.0 of 2 cores free"),
        (2, 2, 2, {"load": "0.4"}, 2, "torch's own choice is 2"),  # this process, starting
        (2, 2, 2, {}, 2, "torch's own choice is 2"),
    ],
)
def test_threads_are_as_many_as_cores_are_free(
    tmp_path: Path, most: int, allowed: int, host: int, files: dict[str, str], count: int, why: str
) -> None:
    found = choose_threads(most, machine(tmp_path, **files), allowed, host)
    assert (found.count, found.reason) == (count, why)
