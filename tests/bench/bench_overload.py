"""More work than plain runs can be: deadlines missed with and without `flexible`. `slipstream bench overload`

Requests arrive at random (Poisson), 1.5 times as many as plain runs can be served of, each to be done within three
times what a plain run takes by itself. Without `flexible` all are plain; with it each is `auto` preferring fidelity,
and is moved down the profile's front where its deadline would be missed, by the app's own prediction of the wait. A
request whose deadline has passed is dropped, as the server does. Time is the bench's clock; nobody sleeps.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field, replace

from matplotlib.figure import Figure

from app.engine.batcher import Batcher
from app.engine.pace import Pace
from models import Request, advance
from models.accelerators import Auto
from models.generate import decode, start
from models.profiles import Profile
from models.profiles.choice import Outlook
from models.resolve import resolve
from models.trajectory import Trajectory
from tests.bench import zoo
from tests.bench.harness import clock, note, options, quiet
from tests.bench.measured import PLAIN_STEPS, SCHEDULER, profile_of
from tests.bench.report import Report
from tests.bench.zoo import Model

LOAD = 1.5
PATIENCE = 3.0  # plain runs' times
TITLE = f"Arrivals at {LOAD} of plain capacity, deadline {PATIENCE:g} plain runs alone"


@dataclass(eq=False)
class Item:
    """One request at work."""

    arrived: float
    trajectory: Trajectory
    chosen: str
    group: int = 0
    work: float = 0.0
    share: str = ""
    weight: float = 1.0

    @property
    def request(self) -> Hashable:
        """Itself: each has one image."""
        return self

    @property
    def num_rows(self) -> int:
        """Rows of the coming step."""
        return self.trajectory.num_rows

    @property
    def rows_left(self) -> int:
        """Rows over all steps still to be computed."""
        return sum(step.num_rows for step in self.trajectory.steps[self.trajectory.step :])


@dataclass
class Outcome:
    """What became of the requests: late ones, the candidates that were chosen, seconds of those that were in time."""

    late: int = 0
    chosen: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)


class Server:
    """The engine's loop over its own batcher and pace."""

    def __init__(self, model: Model, profile: Profile, max_rows: int) -> None:
        self.backbone = model.backbone
        spec = replace(self.backbone.spec, profiles={"bench": profile})
        self.spec = spec
        self.pace = Pace()
        self.max_rows = max_rows
        self.prompts = list(spec.examples)

    def begin(self, seed: int, arrived: float, auto: bool, wait: float, deadline: float | None) -> Item:
        """One request, resolved as the app does."""
        plain = Request(
            prompt=self.prompts[seed % len(self.prompts)],
            seed=seed,
            scheduler=SCHEDULER,
            num_inference_steps=PLAIN_STEPS,
            acceleration=Auto(prefer="fidelity", flexible=True) if auto else (),
        )
        outlook = Outlook(wait, self.pace.tick("m", len(self.spec.roles)), deadline, self.pace.slack("m"))
        run = resolve(self.spec, self.backbone.scheduler_config, plain, outlook)
        chosen = "plain" if run.profile is None else run.profile.candidate
        return Item(arrived, start(self.backbone, run)[0], chosen)

    def tick(self, batcher: Batcher[Item, int]) -> list[Item]:
        """One tick and its pictures; those that are done."""
        items = batcher.next()
        rows, began = sum(item.num_rows for item in items), clock()
        advance(self.backbone, [item.trajectory for item in items])
        if rows:
            self.pace.observe("m", rows, clock() - began)
        done = [item for item in items if item.trajectory.done]
        for item in done:
            batcher.discard(item)
        if done:
            decode(self.backbone, [item.trajectory.latents for item in done])
        return done

    def batcher(self) -> Batcher[Item, int]:
        """An empty line."""
        return Batcher(lambda group: self.max_rows)

    def serve(self, count: int, together: int) -> float:
        """Seconds a plain picture, with so many at work at a time."""
        batcher, seed, done = self.batcher(), 0, 0
        began = clock()
        while done < count:
            while len(batcher) < together and seed < count:
                batcher.add(self.begin(seed, 0.0, False, 0.0, None))
                seed += 1
            done += len(self.tick(batcher))
        return (clock() - began) / count

    def overload(self, arrivals: list[float], patience: float, auto: bool) -> Outcome:
        """Requests arrive at these moments and are given up after `patience` seconds."""
        outcome, batcher = Outcome(), self.batcher()
        began, skipped, coming = clock(), 0.0, list(enumerate(arrivals))
        at_work: dict[Item, None] = {}
        while coming or at_work:
            now = clock() - began + skipped
            if not at_work and coming[0][1] > now:
                skipped += coming[0][1] - now
                now = coming[0][1]
            while coming and coming[0][1] <= now:
                seed, arrived = coming.pop(0)
                wait = self.pace.predict(("m", item.rows_left) for item in at_work)
                item = self.begin(seed, arrived, auto, wait, arrived + patience - now)
                outcome.chosen[item.chosen] += 1
                batcher.add(item)
                at_work[item] = None
            for item in [item for item in at_work if now > item.arrived + patience]:
                outcome.late += 1
                batcher.discard(item)
                del at_work[item]
            if not at_work:
                continue
            for item in self.tick(batcher):
                taken = clock() - began + skipped - item.arrived
                outcome.late += taken > patience
                outcome.latencies.append(taken)
                del at_work[item]
        return outcome


def rows_of(profile: Profile, late: dict[bool, int], total: int, chosen: Counter[str]) -> list[dict[str, object]]:
    """Both disciplines of a model, and what flexible requests became, the most frequent first."""
    known = profile.by_name
    mean = sum(known[one].psnr_converged.mean * count for one, count in chosen.items()) / total
    became = ", ".join(f"{name} {count / total:.0%}" for name, count in chosen.most_common())
    return [
        {
            "model": profile.model,
            "served as": "auto, flexible" if auto else "plain",
            "requests": total,
            "late": late[auto],
            "share": f"{late[auto] / total:.1%}",
            "of those without": f"{late[True] / late[False]:.2f}" if auto and late[False] else "",
            "PSNR to converged, dB": mean if auto else profile.plain.psnr_converged.mean,
            "chosen": became if auto else "",
        }
        for auto in (False, True)
    ]


def main() -> None:
    """Both disciplines under the same arrivals, round after round."""
    given = options(__doc__, models=list(zoo.SMALL), requests=120, captions=16, max_rows=8)
    quiet()
    report = Report("overload", "Overload: deadlines missed with and without flexible", given)
    lines: list[dict[str, object]] = []
    shares: dict[str, Counter[str]] = {}
    for name in zoo.names(given):
        model = zoo.model(name)
        profile = profile_of(model, 2 if given.quick else given.captions)
        server = Server(model, profile, given.max_rows)
        server.serve(4, 4)
        alone = statistics.median(server.serve(1, 1) for _ in range(1 if given.quick else 5))
        each = server.serve(4 if given.quick else 24, given.max_rows)
        count = 6 if given.quick else given.requests
        note(f"{name}: a plain run alone {alone:.3f} s, in full batches {each:.3f} s a picture")
        report.remark(f"{name}: a plain run alone {alone:.3g} s, in full batches {each:.3g} s a picture.")
        late, total = {False: 0, True: 0}, 0
        chosen: Counter[str] = Counter()
        done = list(lines)
        for number in range(given.rounds or 2):
            rng = random.Random(number)
            moments, moment = [], 0.0
            for _ in range(count):
                moment += rng.expovariate(LOAD / each)
                moments.append(moment)
            total += count
            for auto in (False, True):
                outcome = server.overload(moments, PATIENCE * alone, auto)
                late[auto] += outcome.late
                chosen += outcome.chosen if auto else Counter()
            lines = done + rows_of(profile, late, total, chosen)
            report.table(TITLE, lines)  # after every round: a run that is cut off leaves what it has
        shares[name] = chosen
    report.save(lambda figure: draw(figure, lines, shares), (9, 4))


def draw(figure: Figure, lines: list[dict[str, object]], shares: dict[str, Counter[str]]) -> None:
    """Shares of late requests, and what flexible ones became."""
    left, right = figure.subplots(1, 2)
    names = [f"{line['model']}\n{line['served as']}" for line in lines]
    left.bar(names, [100 * int(str(line["late"])) / int(str(line["requests"])) for line in lines])
    left.set_ylabel("late, %")
    left.tick_params(axis="x", labelsize=7)
    for model, chosen in shares.items():
        total = sum(chosen.values())
        right.plot(sorted(chosen), [100 * chosen[one] / total for one in sorted(chosen)], "o-", label=model)
    right.set_ylabel("chosen, %")
    right.tick_params(axis="x", labelsize=7, rotation=60)
    right.legend(fontsize=7)


if __name__ == "__main__":
    main()
