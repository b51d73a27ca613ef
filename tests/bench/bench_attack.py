"""Faults and attacks against a server in a process of its own. `slipstream bench attack`

One table: attack, figure, limit, held or not. The exit code is 1 where something did not hold. `--only 3 5` runs the
attacks of these points; `--models shapes-sd` serves that instead of a small random pipeline.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from tests.bench import attack_edge, attack_engine
from tests.bench.attack import ATTACKS, Arena, Attack, Outcome
from tests.bench.harness import note, options, quiet
from tests.bench.report import Report
from tests.pipelines import save_pipeline

MODULES = (attack_engine, attack_edge)


def run(attack: Attack, arena: Arena) -> Outcome:
    """One attack. One that fails on its own account did not hold."""
    try:
        return attack.run(arena)
    except Exception as error:
        return Outcome(f"{type(error).__name__}: {error}"[:200], "an end", False)


def main() -> None:
    """Run them all, one after another."""
    given = options(__doc__, models=["small"], only=[0])
    quiet()
    report = Report("attack", "Faults and attacks", given)
    rows: list[dict[str, object]] = []
    held = True
    with tempfile.TemporaryDirectory() as folder:
        models = [str(save_pipeline("sd", Path(folder)))] if given.models == ["small"] else given.models
        arena = Arena(models, Path(folder))
        for attack in sorted(ATTACKS, key=lambda one: one.point):
            if (given.only != [0] and attack.point not in given.only) or (given.quick and not attack.quick):
                continue
            note(f"{attack.point}. {attack.name}")
            began = time.monotonic()
            found = run(attack, arena)
            held = held and found.held
            row = {"point": attack.point, "attack": attack.name, "figure": found.figure, "limit": found.limit}
            rows.append(row | {"held": "held" if found.held else "NOT", "seconds": round(time.monotonic() - began)})
    report.table("Attacks", rows)
    report.save()
    if not held:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
