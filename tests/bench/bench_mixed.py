"""What mixing plans in one forward is worth, under closed-loop clients. `slipstream bench mixed`

Clients ask for any accelerator and any number of steps, at any moment. They are served by diffusers one after another
(without accelerators, which its pipelines do not take per request; and U-Nets with the DeepCache package put on for
each request that asks for it), by us one after another, by us in batches of equal settings, by us in batches of equal
plans, and by us in mixed batches; then clients that wish for forecasts, too, by the package and by us: the same
clients, moments and steps, and a forecast is a plain run where the package serves it. Before that, how many rows a
tick pay.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

from matplotlib.figure import Figure

from app.engine.pace import pays
from models import Request, advance, generate
from models.accelerators import DeepCache
from tests.bench import peers, zoo
from tests.bench.harness import elapsed, note, options, quiet
from tests.bench.report import COLOURS, Report, lines
from tests.bench.runs import accelerations, request, trajectories
from tests.bench.traffic import Outcome, batched, equal_plan, equal_settings, mixed, one_by_one, orders
from tests.bench.zoo import Model

Discipline = Callable[[], Outcome]
DIFFUSERS, PACKAGE, MIXED = "diffusers, one by one", "DeepCache package, one by one", "ours, mixed"
PACKAGE_FORETOLD, FORETOLD = f"{PACKAGE}, forecasts wished for", f"{MIXED}, forecasts wished for"
CLOSED = "Closed-loop clients"


def row_costs(model: Model, most: int, repeats: int) -> tuple[dict[int, float], int]:
    """Seconds of a tick of plain guided images by rows, up to `most`, and the rows at which the engine would stop."""
    seconds: dict[int, float] = {}
    rows = 2
    while rows <= most:
        running = trajectories(model, [request(model, repeats + 2, seed=i) for i in range(rows // 2)])
        advance(model.backbone, running)
        seconds[rows] = statistics.median(elapsed(partial(advance, model.backbone, running)) for _ in range(repeats))
        rows *= 2
    return seconds, pays({rows: each / rows for rows, each in seconds.items()})


def disciplines(model: Model, clients: int, each: int, max_rows: int) -> dict[str, Discipline]:
    """The ways to serve the same traffic."""
    traffic, pipeline = orders(model, clients, each), model.pipeline()
    foretold = orders(model, clients, each, foretold=True)
    scale = model.backbone.spec.default_guidance_scale

    def diffusers(one: Request) -> object:
        assert one.num_inference_steps is not None
        return peers.draw(pipeline, model.prompt, one.num_inference_steps, scale, one.seed)

    def package(one: Request) -> object:
        cache = next((a for a in one.accelerators if isinstance(a, DeepCache)), None)
        if cache is None:
            return diffusers(one)
        with peers.deepcache(pipeline, cache.interval, cache.branch):
            return diffusers(one)

    def alone(one: Request) -> object:
        return generate(model.backbone, [one])

    return {
        DIFFUSERS: lambda: one_by_one(traffic, diffusers),
        **({PACKAGE: lambda: one_by_one(traffic, package)} if model.family == "unet" else {}),
        "ours, one by one": lambda: one_by_one(traffic, alone),
        "ours, equal settings": lambda: batched(model, traffic, max_rows, equal_settings),
        "ours, equal plans": lambda: batched(model, traffic, max_rows, equal_plan),
        MIXED: lambda: batched(model, traffic, max_rows, mixed),
        **({PACKAGE_FORETOLD: lambda: one_by_one(foretold, package)} if model.family == "unet" else {}),
        FORETOLD: lambda: batched(model, foretold, max_rows, mixed),
    }


def gains(rows: list[dict[str, object]]) -> Iterator[str]:
    """Images a second with forecasts among the wishes over those of the other ways, a sentence for each."""
    found = {(row["model"], row["clients"], row["served by"]): float(str(row["images/s"])) for row in rows}
    for (model, clients, way), rate in found.items():
        if way == FORETOLD:
            others = (MIXED, PACKAGE, PACKAGE_FORETOLD, DIFFUSERS)
            known = {other: found.get((model, clients, other)) for other in others}
            ratios = (f"{rate / other:.2f} of {name}" for name, other in known.items() if other)
            yield f"{model}, {clients} clients, images/s of {way}: " + ", ".join(ratios) + "."


def line(model: Model, clients: int, name: str, outcomes: list[Outcome]) -> dict[str, object]:
    """A discipline's figures: medians over rounds, percentiles over all orders of all rounds."""
    latencies = sorted(latency for outcome in outcomes for latency in outcome.latencies)
    rows = [rows for outcome in outcomes for rows in outcome.rows]
    plans = [plans for outcome in outcomes for plans in outcome.plans]
    percent = statistics.quantiles(latencies, n=100, method="inclusive")
    return {
        "model": model.name,
        "clients": clients,
        "served by": name,
        "images/s": statistics.median(len(o.latencies) / o.seconds for o in outcomes),
        "p50 s": percent[49],
        "p95 s": percent[94],
        "p99 s": percent[98],
        "rows a tick": statistics.mean(rows) if rows else None,
        "plans a tick": statistics.mean(plans) if plans else None,
    }


def main() -> None:
    """The knee of every model, then the traffic on the small ones."""
    given = options(__doc__, models=[*zoo.SMALL, *zoo.LARGE], clients=[16, 64], each=2, most=64, most_large=8)
    quiet()
    report = Report("mixed", "Clients with different accelerators, steps and arrivals", given)
    ticks: dict[str, dict[int, float]] = {}
    knees: dict[str, int] = {}
    for name in zoo.names(given):
        most = 4 if given.quick else given.most if name in zoo.SMALL else given.most_large
        ticks[name], knees[name] = row_costs(zoo.model(name), most, 2 if given.quick else 5)
    costs: list[dict[str, object]] = [
        {"model": name, "rows": rows, "ms a tick": 1000 * seconds, "ms a row": 1000 * seconds / rows}
        for name, points in ticks.items()
        for rows, seconds in points.items()
    ]
    report.table("Time a tick by rows, all plain", costs)
    report.remark(f"Rows a tick that pay (5 % cheaper a row with every doubling): {knees}.")

    rows: list[dict[str, object]] = []
    for name in [name for name in zoo.names(given) if name in zoo.SMALL]:
        model = zoo.model(name)
        advance(model.backbone, trajectories(model, [request(model, 8, a) for a in accelerations(model, 8).values()]))
        for clients in [3] if given.quick else given.clients:
            cap = max(knees[name], 16)
            ways = disciplines(model, clients, 1 if given.quick else given.each, cap)
            note(f"{name}: {clients} clients, up to {cap} rows a tick")
            found: dict[str, list[Outcome]] = {way: [] for way in ways}
            for _ in range(given.rounds or 1):
                for way, serve in ways.items():
                    found[way].append(serve())
            rows += [line(model, clients, way, outcomes) for way, outcomes in found.items()]
            report.table(CLOSED, rows)  # after each: a run that is cut off leaves what it has
    for sentence in gains(rows):
        report.remark(sentence)
    report.save(lambda figure: draw(figure, ticks, rows), (13, 4))


def draw(figure: Figure, ticks: dict[str, dict[int, float]], rows: list[dict[str, object]]) -> None:
    """Cost a row, throughput, and the slowest hundredth."""
    knee_axes, throughput, latency = figure.subplots(1, 3)
    costs = {
        name: {float(n): seconds / n / (points[2] / 2) for n, seconds in points.items()}
        for name, points in ticks.items()
    }
    lines(knee_axes, costs, "rows a tick", "time a row, over that at 2 rows", log="x")
    ways = list(dict.fromkeys(row["served by"] for row in rows))
    groups = list(dict.fromkeys((row["model"], row["clients"]) for row in rows))
    for axes, key in ((throughput, "images/s"), (latency, "p95 s")):
        for i, way in enumerate(ways):
            known = {(row["model"], row["clients"]): row[key] for row in rows if row["served by"] == way}
            at = [g + i * 0.1 for g, group in enumerate(groups) if group in known]
            axes.bar(at, list(known.values()), 0.09, color=COLOURS[i], label=str(way))
        names = [f"{model}\n{clients} clients" for model, clients in groups]
        axes.set_xticks([g + 0.32 for g in range(len(groups))], names, fontsize=7)
        axes.set_ylabel(key)
    throughput.legend(fontsize=6)


if __name__ == "__main__":
    main()
