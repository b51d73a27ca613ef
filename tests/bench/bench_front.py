"""What the shipped profiles promise, on captions that `calibrate` never saw: forecasts against fewer plain steps.

`slipstream bench front`. Every line is half a plain run's evaluations or less. Its controls are plain runs of as many
evaluations: of the same solver, and of the best one (UniPC). Differences are paired by picture, with standard errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from PIL import Image

from models import Backbone, Request, generate
from models.accelerators import Accelerator, DeepCache, DeltaDiT, from_mode
from models.profiles import Candidate, Likeness, Profile
from models.quality.converged import Converged
from models.quality.metrics import psnr
from models.shapes.judge import ShapesJudge
from tests.bench import zoo
from tests.bench.harness import note, options, quiet
from tests.bench.report import Report

CAPTIONS = 64
EVALUATIONS = (13, 10, 8)
BEST_SOLVER = "unipc"


@dataclass(frozen=True)
class Drawn:
    """One way to draw, measured: one number a picture."""

    to_plain: Sequence[float]
    to_converged: Sequence[float]
    aligned: Sequence[float]
    macs: int

    def likeness(self, to: Likeness) -> Sequence[float]:
        """In decibels."""
        return self.to_plain if to == "plain" else self.to_converged


class Captions:
    """Draws all captions under any setting, once each."""

    def __init__(self, backbone: Backbone, scheduler: str, steps: int, count: int, kept: Converged) -> None:
        self.backbone, self.scheduler, self.steps = backbone, scheduler, steps
        self._judge = ShapesJudge()
        self._texts = self._judge.captions(count)
        self._kept: dict[Any, Drawn] = {}
        self._converged = kept.pictures(self._requests(scheduler, steps))
        self._plain = self._draw(scheduler, steps)[0]

    def _requests(self, scheduler: str, steps: int, *caches: Accelerator) -> list[Request]:
        facts: dict[str, Any] = {"scheduler": scheduler, "num_inference_steps": steps, "acceleration": caches}
        return [Request(prompt=text, seed=i, **facts) for i, text in enumerate(self._texts)]

    def _draw(self, scheduler: str, steps: int, *caches: Accelerator) -> tuple[list[Image.Image], int]:
        results = generate(self.backbone, self._requests(scheduler, steps, *caches), max_rows=32)
        return [result.images[0] for result in results], sum(result.usage.macs for result in results) // len(results)

    def run(self, scheduler: str, steps: int, *caches: Accelerator) -> Drawn:
        """Measured, or from memory."""
        key = (scheduler, steps, caches)
        if key not in self._kept:
            note(f"{scheduler} {steps} {' '.join(cache.mode for cache in caches)}")
            pictures, macs = self._draw(scheduler, steps, *caches)
            self._kept[key] = Drawn(
                [psnr(a, b) for a, b in zip(pictures, self._plain, strict=True)],
                [psnr(a, b) for a, b in zip(pictures, self._converged, strict=True)],
                [self._judge.alignment([p], [t])["all"] for p, t in zip(pictures, self._texts, strict=True)],
                macs,
            )
        return self._kept[key]

    def candidate(self, one: Candidate) -> Drawn:
        """A candidate of a profile."""
        return self.run(one.scheduler, one.num_inference_steps, *(from_mode(mode) for mode in one.acceleration))


def chosen(profile: Profile, evaluations: int, to: Likeness) -> Candidate:
    """The forecast of so many evaluations that the profile found most like the reference."""
    found = [
        one
        for one in profile.candidates
        if one.evaluations == evaluations and [mode["mode"] for mode in one.acceleration] == ["forecast"]
    ]
    return max(found, key=lambda one: one.likeness(to).mean)


def paired(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """The mean difference and its standard error, in decibels."""
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return f"{fmean(differences):+.1f} ± {error:.1f}"


def line(name: str, drawn: Drawn, plain: Drawn) -> dict[str, object]:
    """A table's row without its controls."""
    return {
        "run": name,
        "fewer MACs": f"{plain.macs / drawn.macs:.2f}x",
        "to plain": "–" if drawn is plain else f"{fmean(drawn.to_plain):.1f}",
        "to converged": f"{fmean(drawn.to_converged):.1f}",
        "alignment": f"{fmean(drawn.aligned):.1%}",
    }


def forecasts(captions: Captions, profile: Profile) -> list[dict[str, object]]:
    """For each number of evaluations the best forecasts by both references, and the two controls."""
    plain = captions.run(captions.scheduler, captions.steps)
    empty = {"promised": "", "over same solver": "", "over unipc": "", "over plain, to converged": ""}
    rows = [line("plain", plain, plain) | empty]
    for count in EVALUATIONS:
        same, best = captions.run(captions.scheduler, count), captions.run(BEST_SOLVER, count)
        picks: dict[str, Likeness] = {}
        for to in ("converged", "plain"):
            picks[chosen(profile, count, to).name] = to
        for name, to in picks.items():
            promised = profile.by_name[name]
            mine = captions.candidate(promised)
            rows.append(
                line(f"`{name}` (for {to})", mine, plain)
                | {
                    "promised": f"{promised.promised.psnr:.1f}, {promised.promised.psnr_converged:.1f}",
                    "over same solver": f"{paired(mine.to_plain, same.to_plain)} plain, "
                    f"{paired(mine.to_converged, same.to_converged)} conv.",
                    "over unipc": f"{paired(mine.to_converged, best.to_converged)} conv.",
                    "over plain, to converged": paired(mine.to_converged, plain.to_converged),
                }
            )
        for solver, control in {captions.scheduler: same, BEST_SOLVER: best}.items():
            rows.append(line(f"↳ *{count} plain steps of {solver}*", control, plain) | empty)
    return rows


def orders(captions: Captions) -> list[dict[str, object]]:
    """DeepCache or Δ-DiT that repeats, and that foretells."""
    plain = captions.run(captions.scheduler, captions.steps)
    cache = DeepCache if captions.backbone.spec.family == "unet" else DeltaDiT
    rows = []
    for interval in (2, 3):
        repeated = captions.run(captions.scheduler, captions.steps, cache(interval=interval))
        for order in (0, 1, 2):
            mine = captions.run(captions.scheduler, captions.steps, cache(interval=interval, order=order))
            name = f"{cache.model_fields['mode'].default}:interval={interval},order={order}"
            over = paired(mine.to_plain, repeated.to_plain) if order else ""
            rows.append(line(f"`{name}`", mine, plain) | {"over order 0, to plain": over})
    return rows


def main() -> None:
    """Both bundled models, the solvers of their profiles."""
    given = options(
        __doc__, models=["shapes-sd", "shapes-dit"], schedulers=["ddim", "dpmpp_2m"], captions=CAPTIONS, steps=25
    )
    quiet()
    report = Report("front", "Forecasts of the shipped profiles on held-out captions", given)
    count = 2 if given.quick else given.captions
    for name in zoo.names(given):
        backbone = zoo.model(name).backbone
        kept = Converged(backbone, given.output / "converged", steps=20 if given.quick else 200)
        for scheduler in given.schedulers:
            size = (backbone.spec.native_width, backbone.spec.native_height)
            profile = backbone.spec.profile(scheduler, given.steps, *size)
            if profile is None:
                report.remark(f"{name}: no profile for {scheduler}")
                continue
            captions = Captions(backbone, scheduler, given.steps, count, kept)
            about = f"{name}, {scheduler}, {given.steps} steps, {count} captions, PSNR in dB"
            report.table(about, forecasts(captions, profile))
            report.table(f"{about}: order", orders(captions))
    report.save()


if __name__ == "__main__":
    main()
