"""Caches that decide while they run, MagCache and TaylorSeer, against uniform ones and fewer plain steps at equal MACs.

`slipstream bench caches`. Likeness to the plain picture of the same seed and to a converged one (200 steps), on
captions that the models never saw; MACs are what the runs really did. TeaCache's polynomial and MagCache's ratios are
those of the shipped profiles. Differences are paired by picture, with standard errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from models import Backbone
from models.accelerators import (
    Accelerator,
    AdaptiveDeepCache,
    DeepCache,
    DeltaDiT,
    FirstBlockCache,
    Forecast,
    MagCache,
    TaylorSeer,
    TeaCache,
)
from models.quality.converged import Converged
from tests.bench import zoo
from tests.bench.bench_front import Captions, Drawn, paired
from tests.bench.harness import note, options, quiet
from tests.bench.report import Report

STEPS, CAPTIONS = 25, 16


def uniform(backbone: Backbone) -> list[Accelerator]:
    """Caches that compute every n-th step."""
    cache: Any = DeepCache if backbone.spec.family == "unet" else DeltaDiT
    return [cache(interval=n, order=order) for n in (2, 3) for order in (0, 1)]


def others(backbone: Backbone) -> list[Accelerator]:
    """Caches that decide while they run, and what foretells."""
    forecasts: list[Accelerator] = [Forecast(interval=2), Forecast(interval=3)]
    if backbone.spec.family == "unet":
        return [*(AdaptiveDeepCache(threshold=t, order=order) for t in (0.1, 0.2) for order in (0, 1)), *forecasts]
    return [
        *(FirstBlockCache(threshold=t, order=order) for t in (0.05, 0.1) for order in (0, 1)),
        *(TeaCache(threshold=t, order=order) for t in (0.1, 0.2) for order in (0, 1)),
        *(MagCache(threshold=0.12, order=order) for order in (0, 1)),
        *(TaylorSeer(interval=n, order=order) for n, order in ((2, 2), (3, 1), (3, 2))),
        *forecasts,
    ]


def name_of(cache: Accelerator) -> str:
    """Its interval, and what is not as by default."""
    facts = cache.model_dump(include={"interval"} & type(cache).model_fields.keys())
    facts |= cache.model_dump(exclude_defaults=True, exclude={"mode"})
    return cache.mode + "".join(f" {key}={value}" for key, value in facts.items())


def rows(captions: Captions) -> Iterator[dict[str, object]]:
    """One of each cache. Beside those that are not uniform stands the uniform one that costs most of no more."""
    plain = captions.run(captions.scheduler, captions.steps)
    known: list[tuple[str, Drawn]] = []
    even = uniform(captions.backbone)
    for cache in (*even, *others(captions.backbone)):
        mine = captions.run(captions.scheduler, captions.steps, cache)
        steps = max(1, int(captions.steps * mine.macs / plain.macs))
        control = captions.run(captions.scheduler, steps)
        beside = max(
            (one for one in known if one[1].macs <= 1.02 * mine.macs), key=lambda one: one[1].macs, default=None
        )
        own = cache in even
        over = (paired(mine.to_plain, control.to_plain), paired(mine.to_converged, control.to_converged))
        yield {
            "run": name_of(cache),
            "fewer MACs": f"{plain.macs / mine.macs:.2f}x",
            "to plain": f"{fmean(mine.to_plain):.1f}",
            "to converged": f"{fmean(mine.to_converged):.1f}",
            "plain steps": steps,
            "over them": ", ".join(over),
            "uniform": "" if own or beside is None else beside[0],
            "over it": "" if own or beside is None else paired(mine.to_plain, beside[1].to_plain),
        }
        if own:
            known.append((name_of(cache), mine))


def main() -> None:
    """Both bundled models, two solvers."""
    given = options(
        __doc__, models=["shapes-sd", "shapes-dit"], schedulers=["ddim", "dpmpp_2m"], captions=CAPTIONS, steps=STEPS
    )
    quiet()
    report = Report("caches", "Caches against fewer plain steps", given)
    count = 2 if given.quick else given.captions
    for name in zoo.names(given):
        backbone = zoo.model(name).backbone
        kept = Converged(backbone, given.output / "converged", steps=20 if given.quick else 200)
        for scheduler in given.schedulers:
            note(f"{name}, {scheduler}")
            about = f"{name}, {scheduler}, {given.steps} steps, {count} captions, PSNR in dB to plain, to converged"
            table: Sequence[dict[str, object]] = []
            for row in rows(Captions(backbone, scheduler, given.steps, count, kept)):
                table = [*table, row]
                report.table(about, table)  # after each: a run that is cut off leaves what it has
    report.save()


if __name__ == "__main__":
    main()
