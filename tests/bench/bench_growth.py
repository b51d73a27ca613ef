"""What grows with what: time a tick and memory with rows, steps, pixels and plans; the batcher with its waiting line.

`slipstream bench growth`. The batcher's own cost a tick has to stay flat up to 10,000 waiting images.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from app.engine.batcher import Batcher
from app.engine.job import Job, Lane
from models import Request, advance
from models.resolve import resolve
from tests.bench import zoo
from tests.bench.harness import elapsed, note, options, quiet
from tests.bench.report import Report, lines
from tests.bench.runs import accelerations, request, trajectories
from tests.bench.zoo import Model

MAX_ROWS = 16
TICKS = 5


LINES = ("all guided", "one row left over, none fits", "memory full, none may start")


def batcher_cost(model: Model, line: str, waiting: int) -> float:
    """Seconds of one `next` with so many images of one size in the line, of which the first four run already."""
    batcher: Batcher[Lane, object] = Batcher(lambda group: MAX_ROWS)
    guided, unguided = (_job(model, scale) for scale in (4.0, 1.0))
    running = trajectories(model, [request(model, 2)])[0]
    for i in range(waiting):
        job = unguided if line == LINES[1] and i == 0 else guided
        batcher.add(lane := Lane(job, i, guided.group, running if i < 4 else None))
        if lane.started:
            batcher.begin(lane)
    admit = (lambda _: False) if line == LINES[2] else (lambda _: True)
    return statistics.median(elapsed(partial(batcher.next, admit)) for _ in range(51))


def _job(model: Model, scale: float) -> Job:
    backbone = model.backbone
    run = resolve(backbone.spec, backbone.scheduler_config, replace(request(model, 20), guidance_scale=scale))
    return Job("bench", model.name, run, "none", lambda event: None)


def tick(model: Model, requests: list[Request]) -> dict[str, object]:
    """Time of a tick, and bytes: features held after it, and what the process took at the most beyond its start."""
    running = trajectories(model, requests)
    advance(model.backbone, running)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    times = []
    features = 0
    for _ in range(TICKS):
        times.append(elapsed(lambda: advance(model.backbone, running)))
        features = max(features, sum(trajectory.memory_bytes() for trajectory in running))
    return {
        "ms a tick": 1000 * statistics.median(times),
        "feature KiB": features / 1024,
        "peak MiB above rest": max(0.0, (_resident("VmHWM") - before) / 2**20),
    }


def _resident(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return float(line.split()[1]) * 1024


def growth(model: Model, quick: bool) -> list[dict[str, object]]:
    """One line a point: what grows, how much, and what it costs."""
    found: list[dict[str, object]] = []

    def point(what: str, amount: int, requests: list[Request]) -> None:
        found.append({"model": model.name, "grows": what, "to": amount, **tick(model, requests)})

    steps = TICKS + 3
    kinds = [a for label, a in accelerations(model, steps).items() if "ditfastattn" not in label]
    width = model.backbone.spec.native_width
    for images in (1, 2) if quick else (1, 2, 4, 8, 16, 32):
        point("rows", 2 * images, [request(model, steps, seed=i) for i in range(images)])
    for count in (10,) if quick else (10, 25, 50, 100, 250):
        point("steps", count, [request(model, count, kinds[1])] * 4)
    for factor in (1,) if quick else (1, 2, 4):
        size = factor * width
        point("pixels", size * size, [replace(request(model, steps), width=size, height=size)] * 2)
    for plans in (1, 2) if quick else (1, 2, 3, 4, 6):
        chosen = kinds[:plans]
        point("plans", plans, [request(model, steps, chosen[i % plans], seed=i) for i in range(12)])
    return found


def main() -> None:
    """Batcher first, then every small model."""
    given = options(__doc__, models=list(zoo.SMALL))
    quiet()
    report = Report("growth", "What grows with what", given)
    lengths = (10, 100) if given.quick else (10, 100, 1000, 10_000)
    first = zoo.model(given.models[0])
    costs = {label: {float(n): 1e6 * batcher_cost(first, label, n) for n in lengths} for label in LINES}
    report.table(
        f"Batcher: µs to choose a tick of {MAX_ROWS} rows, by images in the line",
        [{"line": label, **{str(int(n)): value for n, value in points.items()}} for label, points in costs.items()],
    )
    grown: dict[str, list[dict[str, object]]] = {}
    for name in zoo.names(given):
        note(name)
        grown[name] = growth(zoo.model(name), given.quick)
        report.table(name, grown[name])

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 5)
        lines(panels[0], costs, "images in the line", "µs to choose a tick", log="xy")
        for axes, what in zip(panels[1:], ("rows", "steps", "pixels", "plans"), strict=True):
            series = {
                name: {float(str(p["to"])): float(str(p["ms a tick"])) for p in points if p["grows"] == what}
                for name, points in grown.items()
            }
            lines(axes, series, what, "ms a tick", log="x" if what in ("rows", "pixels") else "")

    report.save(draw, (18, 3.6))


if __name__ == "__main__":
    main()
