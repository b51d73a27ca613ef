"""Small requests beside a flood of large ones: how long they take, by who is served when. `slipstream bench fairness`

A flood of clients keeps the device busy with long runs while a few ask for short ones, each after the last. Once
whoever came first is served first, once by our rule with the small ones in the flood's own share (one address), once
with a share of their own. Only what came while the flood lasted is counted.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from models import Request
from tests.bench import zoo
from tests.bench.harness import Spread, note, options, quiet
from tests.bench.report import Report
from tests.bench.traffic import Item, Order, Outcome, batched, mixed

SMALL = 4
"""Clients who ask for short runs."""
Place = Callable[[Item], None]


def first_come(item: Item) -> None:
    """Who came first is served first: no work is known, and all are one share."""


def one_share(item: Item) -> None:
    """Our rule, where all come from one address."""
    trajectory = item.trajectory
    item.work = sum(step.num_rows for step in trajectory.steps)


def own_share(item: Item) -> None:
    """Our rule, where the client of small requests has its own key."""
    one_share(item)
    item.share = "small" if item.order.client < SMALL else "flood"


WAYS: dict[str, Place] = {"first come, first served": first_come, "one client": one_share, "two clients": own_share}


def traffic(model: zoo.Model, flood: int, large: int, small: int, count: int) -> list[list[Order]]:
    """`SMALL` clients with `count` requests of `small` steps each, and `flood` that have two of `large` steps each."""
    rng, prompt = random.Random(0), model.backbone.spec.examples[0]

    def order(client: int, steps: int, delay: float) -> Order:
        return Order(client, Request(prompt=prompt, num_inference_steps=steps, seed=rng.randrange(2**31)), "", delay)

    asking = [[order(client, small, rng.expovariate(10.0)) for _ in range(count)] for client in range(SMALL)]
    return asking + [[order(client, large, 0.0)] * 2 for client in range(SMALL, SMALL + flood)]


def main() -> None:
    """Measure."""
    given = options(__doc__, flood=16, large=60, small=5, count=10, rows=16)
    quiet()
    report = Report("fairness", "Small requests beside a flood", given)
    model = zoo.model("shapes-sd")
    flood, large, count = (4, 8, 3) if given.quick else (given.flood, given.large, given.count)
    rows: list[dict[str, object]] = []
    for name, place in WAYS.items():
        note(name)
        found: Outcome = batched(model, traffic(model, flood, large, given.small, count), given.rows, mixed, place)
        floods = [moment for client in range(SMALL, SMALL + flood) for moment in found.by_client[client]]
        until = max(done for _, done in floods)
        asked = [moment for client in range(SMALL) for moment in found.by_client[client]]
        taken = sorted(done - came for came, done in asked if came < until)
        rows.append(
            {
                "served": name,
                "small": len(taken),
                "small p50 s": round(taken[len(taken) // 2], 2),
                "small p95 s": round(taken[int(0.95 * (len(taken) - 1))], 2),
                "large s": Spread.of([done - came for came, done in floods]),
                "flood over s": round(until, 1),
                "all s": round(found.seconds, 1),
                "rows a tick": round(sum(found.rows) / len(found.rows), 1),
            }
        )
    what = f"{SMALL} clients with {count} requests of {given.small} steps each beside {flood} with 2 of {large} steps"
    report.table(what, rows)
    report.save(None)


if __name__ == "__main__":
    main()
