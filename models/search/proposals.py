"""What `calibrate` tries: fewer steps, forecasts by grid, mask and order, caches, students, and their compositions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from models.accelerators import Accelerator, CfgStudent, DeepCache, DeltaDiT, Forecast
from models.accelerators.forecast import spread
from models.search.masks import Grid, Path
from models.solvers.names import NoiseSchedule
from models.spec import ModelSpec

SOLVERS = ("unipc", "dpmpp_2m")
"""Offered beside the profile's own scheduler: the best at few steps."""
SHARES = (0.52, 0.4, 0.32)
"""Evaluations tried, as shares of the plain run's: 13, 10 and 8 of 25."""
FINER = (1, 2)
"""Grids of forecasts: so many times the plain run's steps."""
MOST_STEPS = {1: 30, 2: 30, 3: 0}
"""Steps up to which the dynamic programme of an order takes seconds; beyond, masks are refined from even ones."""


@dataclass(frozen=True)
class Proposal:
    """A run to measure. `group` is shared by forecasts that compete: as many evaluations on one grid."""

    name: str
    scheduler: str
    num_inference_steps: int
    acceleration: tuple[Accelerator, ...] = ()
    group: tuple[int, int] | None = None
    even: bool = False


def counts(steps: int) -> list[int]:
    """The numbers of evaluations that are tried, most first."""
    return sorted({max(2, round(share * steps)) for share in SHARES}, reverse=True)


def solvers(spec: ModelSpec, scheduler: str, steps: int) -> Iterator[Proposal]:
    """Plain runs of fewer steps, of the profile's scheduler and of the best ones."""
    for name in dict.fromkeys((scheduler, *(s for s in SOLVERS if s in spec.schedulers))):
        for count in counts(steps):
            yield Proposal(f"{name}-{count}", name, count)


def even_forecasts(scheduler: str, steps: int, lengths: dict[int, int]) -> Iterator[Proposal]:
    """Forecasts whose computed steps are spread evenly; `lengths` are the evaluations of each grid's plain run."""
    for grid, length in lengths.items():
        for count in counts(steps):
            for order in (1, 2):
                forecast = Forecast(evaluations=count, order=order)
                yield _forecast(scheduler, grid, length, forecast, sorted(spread(count, length)), "even")


def searched_forecasts(
    scheduler: str, steps: int, schedules: dict[int, NoiseSchedule], path: Path
) -> Iterator[Proposal]:
    """Forecasts by the masks that the recorded path proposes: the dynamic programme's, and those refined from it."""
    for grid, schedule in schedules.items():
        for order in (1, 3) if grid > steps else (1, 2):
            search = Grid(schedule, path, order)
            best = search.best(max(counts(steps))) if search.steps <= MOST_STEPS[order] else {}
            for count in counts(steps):
                even = tuple(sorted(spread(count, search.steps)))
                starts = [even] + ([best[count]] if count in best else [])
                refined = min((search.refined(mask) for mask in starts), key=search.error)
                for mask, kind in {refined: "refined", best.get(count, refined): "best"}.items():
                    if mask != even or order > 2:
                        forecast = Forecast(steps=mask, order=order)
                        yield _forecast(scheduler, grid, search.steps, forecast, mask, kind)


def _forecast(scheduler: str, grid: int, length: int, forecast: Forecast, mask: Sequence[int], kind: str) -> Proposal:
    name = f"forecast-{len(mask)}of{length}-{kind}-o{forecast.order}"
    return Proposal(name, scheduler, grid, (forecast,), (len(mask), length), kind == "even")


def caches(spec: ModelSpec, scheduler: str, steps: int) -> Iterator[Proposal]:
    """Every cache that suits the model, at a few settings, and the students, alone and under a forecast."""
    found: dict[str, tuple[Accelerator, ...]] = {}
    for interval in (2, 3):
        for order in (0, 1):
            if spec.family == "unet":
                found[f"deepcache-{interval}-o{order}"] = (DeepCache(interval=interval, order=order),)
            elif spec.depth > 1:
                found[f"delta_dit-{interval}-o{order}"] = (DeltaDiT(interval=interval, order=order),)
    for adapter in spec.adapters:
        student = CfgStudent(adapter=adapter)
        found[f"student-{adapter}"] = (student,)
        half = Forecast(evaluations=counts(steps)[0], order=1)
        found[f"student-{adapter}+forecast-{counts(steps)[0]}of{steps}"] = (student, half)
    for name, acceleration in found.items():
        yield Proposal(name, scheduler, steps, acceleration)
