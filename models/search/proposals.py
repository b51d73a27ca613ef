"""What `calibrate` tries: fewer steps, forecasts by grid, mask and order, caches, students, and their compositions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from models.accelerators import (
    Accelerator,
    AdaptiveDeepCache,
    CfgStudent,
    DeepCache,
    DeltaDiT,
    FirstBlockCache,
    Forecast,
    MagCache,
    TaylorSeer,
    TeaCache,
)
from models.accelerators.forecast import spread
from models.networks.sites import blocks, feed_forward
from models.search.fitting import Fit
from models.search.masks import Grid, Path
from models.solvers.names import NoiseSchedule
from models.spec import ModelSpec

SOLVERS = ("unipc", "dpmpp_2m")
"""Offered beside the profile's own scheduler: the best at few steps."""
SHARES = (0.52, 0.4, 0.32)
"""Evaluations tried, as shares of the plain run's: 13, 10 and 8 of 25."""
FINER = (1, 2)
"""Grids of forecasts: so many times the plain run's steps."""
MOST_STEPS = {1: 60, 2: 30}
"""Steps up to which the dynamic programme of an order takes seconds."""


@dataclass(frozen=True)
class Proposal:
    """A run to measure. `group` is shared by forecasts that compete: as many evaluations of one solver on one grid."""

    name: str
    scheduler: str
    num_inference_steps: int
    acceleration: tuple[Accelerator, ...] = ()
    group: tuple[str, int, int] | None = None
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
    """Forecasts by the masks that the dynamic programme finds along the recorded path."""
    for grid, schedule in schedules.items():
        for order, most in MOST_STEPS.items():
            search = Grid(schedule, path, order)
            if search.steps > most:
                continue
            best = search.best(max(counts(steps)))
            for count in counts(steps):
                if count in best and best[count] != tuple(sorted(spread(count, search.steps))):
                    forecast = Forecast(steps=best[count], order=order)
                    yield _forecast(scheduler, grid, search.steps, forecast, best[count], "best")


def _forecast(scheduler: str, grid: int, length: int, forecast: Forecast, mask: Sequence[int], kind: str) -> Proposal:
    name = f"forecast-{len(mask)}of{length}-{kind}-o{forecast.order}"
    return Proposal(name, scheduler, grid, (forecast,), (scheduler, len(mask), length), kind == "even")


def under(solver: str, proposal: Proposal) -> Proposal:
    """A proposal of another solver than the profile's own, by a name that says so."""
    return replace(proposal, name=f"{solver}-{proposal.name}")


def caches(spec: ModelSpec, scheduler: str, steps: int, fit: Fit | None) -> Iterator[Proposal]:
    """Every cache that suits the model, at a few settings, and the students, alone and under a forecast."""
    found: dict[str, tuple[Accelerator, ...]] = {}
    for interval in (2, 3):
        for order in (0, 1):
            if spec.family == "unet":
                found[f"deepcache-{interval}-o{order}"] = (DeepCache(interval=interval, order=order),)
            elif spec.depth > 1:
                found[f"delta_dit-{interval}-o{order}"] = (DeltaDiT(interval=interval, order=order),)
    if spec.family == "unet":
        found["adaptive_deepcache-o1"] = (AdaptiveDeepCache(order=1),)
    elif spec.depth > 1:
        if "recall" in spec.sites.understands(feed_forward(0)):
            found["taylorseer-3"] = (TaylorSeer(interval=3),)
        if "gated by residual" in spec.sites.understands(blocks(1, spec.depth)):
            found["first_block_cache-o1"] = (FirstBlockCache(order=1),)
    if fit is not None:
        found["magcache-o1"] = (MagCache(ratios=fit.mag_ratios, order=1),)
        found["teacache-o1"] = (TeaCache(coefficients=fit.tea_coefficients, order=1),)
    for adapter in spec.students:
        student = CfgStudent(adapter=adapter)
        found[f"student-{adapter}"] = (student,)
        half = Forecast(evaluations=counts(steps)[0], order=1)
        found[f"student-{adapter}+forecast-{counts(steps)[0]}of{steps}"] = (student, half)
    for name, acceleration in found.items():
        yield Proposal(name, scheduler, steps, acceleration)
