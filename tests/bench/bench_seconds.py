"""How often `max_seconds` is met on a machine that does nothing else. `slipstream bench seconds`

Requests come one after another to the server's engine, each `auto` with another `max_seconds`, from what the cheapest
run of the profile takes to more than the plain run's time. A request is met where it is answered, as a file, within
them; one that the server refuses, because it predicts that nothing is fast enough, is no picture that came too late.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from queue import Queue
from statistics import fmean, median

from matplotlib.figure import Figure

from app.engine.engine import Engine
from app.engine.job import Failed, Finished, Job
from app.http.pictures import encode
from app.metrics import Metrics
from app.settings import Settings
from models import Request
from models.accelerators import Auto
from models.errors import OutOfRange
from models.families.vae import to_pictures
from models.profiles import Profile
from models.resolve import resolve
from tests.bench import zoo
from tests.bench.harness import clock, note, options, quiet
from tests.bench.measured import PLAIN_STEPS, SCHEDULER, profile_of
from tests.bench.report import COLOURS, Report
from tests.bench.zoo import Model

TARGET = 0.95
LEAST, MOST = 0.25, 1.5  # of the plain run's seconds
DEADLINE = 600.0
_numbers = count()


class Client:
    """Asks the engine as the app does, and waits for the file."""

    def __init__(self, engine: Engine, model: Model, profile: Profile) -> None:
        self._engine = engine
        self._backbone = model.backbone
        self._spec = replace(model.backbone.spec, profiles={"bench": profile})

    def draw(self, seed: int, wish: Auto | None) -> tuple[float, str]:
        """Seconds, and the candidate. Raises `OutOfRange` where the server refuses."""
        began = clock()
        request = Request(
            prompt=self._spec.examples[seed % len(self._spec.examples)],
            seed=seed,
            scheduler=SCHEDULER,
            num_inference_steps=PLAIN_STEPS,
            acceleration=() if wish is None else wish,
        )
        outlook = self._engine.outlook(self._spec.name, len(self._spec.roles), DEADLINE)
        run = resolve(self._spec, self._backbone.scheduler_config, request, outlook)
        events: Queue[object] = Queue()
        self._engine.submit(Job(f"seconds-{next(_numbers)}", self._spec.name, run, "auto", events.put))
        while not isinstance(event := events.get(timeout=DEADLINE), Finished):
            if isinstance(event, Failed):
                raise event.error
        for image in event.images:
            encode(to_pictures(image[None])[0], "png", {}, seed)
        return clock() - began, "plain" if run.profile is None else run.profile.candidate


@contextmanager
def served(model: Model, profile: Profile) -> Iterator[Client]:
    """An engine with the app's own prediction, on this bench's clock."""
    name = model.name
    backbone = replace(model.backbone, spec=replace(model.backbone.spec, profiles={"bench": profile}))
    engine = Engine(lambda pace: ({name: backbone}, {name: 16}), Settings(model=(name,)), Metrics(), clock=clock)
    engine.start()
    try:
        while engine.state == "loading":
            engine._thread.join(0.01)
        engine.check()
        yield Client(engine, model, profile)
    finally:
        engine.close()


def asked(client: Client, plain: float, requests: int) -> list[tuple[float, float | None, str]]:
    """Each request's `max_seconds`, the seconds it took (None: refused), and what was chosen."""
    rng, found = random.Random(7), list[tuple[float, float | None, str]]()
    for seed in range(requests):
        most = plain * rng.uniform(LEAST, MOST)
        try:
            found.append((most, *client.draw(seed, Auto(max_seconds=most))))
        except OutOfRange:
            found.append((most, None, "refused"))
    return found


def line(
    name: str, plain: float, answers: list[tuple[float, float | None, str]], profile: Profile
) -> dict[str, object]:
    """A model's figures; means are over the requests that were not refused."""
    pairs = [(most, taken) for most, taken, _ in answers if taken is not None]
    chosen = Counter(one for _, _, one in answers)
    known = profile.by_name
    return {
        "model": name,
        "plain, s": plain,
        "requests": len(answers),
        "refused": chosen["refused"],
        "met": f"{sum(taken <= most for most, taken in pairs) / max(1, len(pairs)):.1%}",
        "seconds used of those allowed": f"{median(taken / most for most, taken in pairs):.0%}" if pairs else "",
        "PSNR to converged, dB": fmean(known[one].psnr_converged.mean for _, taken, one in answers if taken is not None)
        if pairs
        else None,
        "chosen": ", ".join(f"{one} {times}" for one, times in chosen.most_common() if one != "refused"),
    }


def main() -> None:
    """Both bundled models, one after another."""
    given = options(__doc__, models=list(zoo.SMALL), requests=150, captions=16)
    quiet()
    report = Report("seconds", "max_seconds on an idle machine", given)
    lines: list[dict[str, object]] = []
    points: dict[str, list[tuple[float, float]]] = {}
    for name in zoo.names(given):
        model = zoo.model(name)
        profile = profile_of(model, 2 if given.quick else given.captions)
        with served(model, profile) as client:
            plain = median(client.draw(seed, None)[0] for seed in range(2 if given.quick else 8))
            note(f"{name}: a plain run takes {plain:.3f} s")
            answers = asked(client, plain, 6 if given.quick else given.requests)
        points[name] = [(most / plain, taken / plain) for most, taken, _ in answers if taken is not None]
        lines.append(line(name, plain, answers, profile))
        report.table(f"Requests one after another, max_seconds {LEAST:g} to {MOST:g} of a plain run", lines)
    report.save(lambda figure: draw(figure, points), (9, 4))


def draw(figure: Figure, points: dict[str, list[tuple[float, float]]]) -> None:
    """Seconds taken over seconds allowed, in plain runs."""
    for axes, colour, (name, pairs) in zip(
        figure.subplots(1, len(points), squeeze=False)[0], COLOURS, points.items(), strict=False
    ):
        axes.plot([most for most, _ in pairs], [taken for _, taken in pairs], "o", markersize=3, color=colour)
        axes.plot([0, MOST], [0, MOST], "--", color="0.6", linewidth=1)
        axes.set(title=name, xlabel="max_seconds, in plain runs", ylabel="taken, in plain runs")


if __name__ == "__main__":
    main()
