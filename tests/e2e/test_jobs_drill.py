"""The short form of `slipstream bench drill`: servers killed while clients submit, on SQLite and two on PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.drill import Drill, Server, compare, drill, running
from tests.postgres import postgres


def check(report: Drill, kills: int) -> None:
    assert report.kills == kills
    assert (report.lost, report.failed, report.twice) == ([], {}, 0), str(report)
    assert report.equal == report.compared == 60, str(report)


def test_one_server_is_killed(pipeline_dir: Callable[[str], Path], tmp_path: Path) -> None:
    settings = {"model": pipeline_dir("sd"), "data_dir": tmp_path / "data", "batch_invariant": True}
    server = Server(settings, tmp_path / "log", forked=True)
    with running([server]):
        report = drill([server], jobs=60, kills=2, clients=4, gap=0.7)
        compare(server, server, report, sample=60)
    check(report, 2)


def test_two_servers_share_postgresql_and_are_killed_in_turn(
    pipeline_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    with postgres() as url:
        settings = {"model": pipeline_dir("sd"), "jobs_url": url, "job_lease_seconds": 2, "batch_invariant": True}
        servers = [Server(settings, tmp_path / f"log{i}", forked=True) for i in range(2)]
        with running(servers):
            report = drill(servers, jobs=60, kills=2, clients=4, gap=0.7)
            compare(servers[0], servers[1], report, sample=60)
    check(report, 2)
