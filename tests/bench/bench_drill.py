"""The drill at length: thousands of jobs, servers killed with SIGKILL at random, every job held to account.

`--postgres` starts a PostgreSQL and two servers on it, of which one at a time is killed.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.bench.harness import ROOT
from tests.drill import Server, compare, drill, running
from tests.pipelines import save_pipeline
from tests.postgres import postgres


def main() -> None:
    """Run it and print what came of it; exit code 1: a job was lost, failed, there twice, or drew another picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--sample", type=int, default=200, help="Pictures that are compared to an undisturbed run's.")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--gap", type=float, default=8.0, help="Most seconds from a server that is ready to its end.")
    parser.add_argument("--model", default="", help="What is served; a tiny random model where nothing is said.")
    parser.add_argument("--postgres", action="store_true", help="Two servers on one PostgreSQL.")
    parser.add_argument("--forked", action="store_true", help="Servers are forks of one process: they start faster.")
    parser.add_argument("--quick", action="store_true", help="A smoke run.")
    asked = parser.parse_args()
    if asked.quick:
        asked.jobs, asked.kills, asked.sample, asked.gap, asked.forked = 40, 1, 5, 1.0, True
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slipstream-drill-")))
        model = asked.model or save_pipeline("sd", folder)
        settings: dict[str, Any] = {"model": model, "batch_invariant": True}
        if asked.postgres:
            settings |= {"jobs_url": stack.enter_context(postgres()), "job_lease_seconds": 5}
        else:
            settings["data_dir"] = folder / "data"
        servers = [Server(settings, folder / f"log{i}", forked=asked.forked) for i in range(1 + asked.postgres)]
        undisturbed = Server({"model": model, "batch_invariant": True}, folder / "log-undisturbed", forked=asked.forked)
        stack.enter_context(running([*servers, undisturbed]))
        report = drill(servers, asked.jobs, asked.kills, clients=asked.clients, steps=asked.steps, gap=asked.gap)
        compare(servers[-1], undisturbed, report, asked.sample, asked.steps)
    text = f"{'two servers on PostgreSQL' if asked.postgres else 'one server on SQLite'}: {report}"
    print(text)
    target = ROOT / "runs" / "bench" / f"drill-{'postgresql' if asked.postgres else 'sqlite'}.txt"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + "\n")
    raise SystemExit(bool(report.lost or report.failed or report.twice or report.equal < report.compared))


if __name__ == "__main__":
    main()
