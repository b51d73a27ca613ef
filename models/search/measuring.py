"""Runs drawn and scored: likeness of every picture to the plain and to the converged one, cost, and time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image
from pydantic import BaseModel, ConfigDict
from scipy.stats import binomtest, t

from models.backbone import Backbone
from models.generate import generate
from models.profiles import Candidate, Measure, Promise
from models.quality.judge import Judge
from models.quality.metrics import psnr, ssim
from models.request import Request
from models.search.proposals import Proposal

CHUNK = 16
"""Pictures drawn together: 32 guided rows a forward."""
CONFIDENCE = 0.99
"""That a mean over other captions is no lower than what is promised: of each run, so that a front's hold together."""


class Scores(BaseModel):
    """What one proposal's pictures are worth, one number a picture, and what one of them costs."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    evaluations: float
    macs: int
    seconds: float
    to_plain: tuple[float, ...]
    to_converged: tuple[float, ...]
    ssim: tuple[float, ...]
    aligned: tuple[float, ...] | None = None


@dataclass
class Measuring:
    """Draws the choosing prompts under any proposal; `plain` and `converged` are their pictures to compare with."""

    backbone: Backbone
    requests: Sequence[Request]
    judge: Judge | None
    clock: Callable[[], float]
    plain: Sequence[Image.Image] = ()
    converged: Sequence[Image.Image] = ()

    def draw(self, proposal: Proposal) -> tuple[list[Image.Image], float, float, int]:
        """Its pictures, and of one of them the seconds, evaluations and MACs, on average."""
        requests = [
            replace(
                request,
                scheduler=proposal.scheduler,
                num_inference_steps=proposal.num_inference_steps,
                acceleration=proposal.acceleration,
            )
            for request in self.requests
        ]
        results, seconds = [], 0.0
        for start in range(0, len(requests), CHUNK):
            began = self.clock()
            results += generate(self.backbone, requests[start : start + CHUNK])
            seconds += self.clock() - began
        count = len(results)
        evaluations = sum(result.usage.evaluations for result in results) / count
        macs = round(sum(result.usage.macs for result in results) / count)
        return [result.images[0] for result in results], seconds / count, evaluations, macs

    def score(self, proposal: Proposal) -> Scores:
        """Draw and compare."""
        pictures, seconds, evaluations, macs = self.draw(proposal)
        return Scores(
            evaluations=evaluations,
            macs=macs,
            seconds=seconds,
            to_plain=tuple(psnr(a, b) for a, b in zip(pictures, self.plain, strict=True)),
            to_converged=tuple(psnr(a, b) for a, b in zip(pictures, self.converged, strict=True)),
            ssim=tuple(ssim(a, b) for a, b in zip(pictures, self.plain, strict=True)),
            aligned=self._aligned(pictures),
        )

    def _aligned(self, pictures: Sequence[Image.Image]) -> tuple[float, ...] | None:
        captions = [str(request.prompt) for request in self.requests]
        if self.judge is None or not self.judge.reads(pictures, captions):
            return None
        judge = self.judge
        return tuple(judge.alignment([p], [c])["all"] for p, c in zip(pictures, captions, strict=True))


def candidate(proposal: Proposal, scores: Scores, plain_seconds: float) -> Candidate:
    """A line of the profile."""
    return Candidate(
        name=proposal.name,
        scheduler=proposal.scheduler,
        num_inference_steps=proposal.num_inference_steps,
        acceleration=tuple(
            one.model_dump(mode="json", by_alias=True, exclude_defaults=True) | {"mode": one.mode}
            for one in proposal.acceleration
        ),
        evaluations=round(scores.evaluations, 3),
        macs=scores.macs,
        seconds=round(scores.seconds / plain_seconds, 4),
        psnr=measure(scores.to_plain, 2),
        ssim=measure(scores.ssim, 5),
        psnr_converged=measure(scores.to_converged, 2),
        alignment=None if scores.aligned is None else measure(scores.aligned, 4),
    )


def measure(values: Sequence[float], digits: int) -> Measure:
    """The mean of one number a picture, and its standard error; one picture has none to speak of."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Measure(mean=round(statistics.fmean(values), digits), error=round(error, digits))


def promise(scores: Scores) -> Promise:
    """What the means over other captions of this kind are at least: Student's one-sided bound, and for the share of
    pictures that keep all claims Wilson's. One picture promises no more than what it has."""
    kept = None if scores.aligned is None else round(sum(scores.aligned))
    share = None
    if kept is not None:
        found = binomtest(kept, len(scores.ssim)).proportion_ci(2 * CONFIDENCE - 1, "wilson")
        share = round(float(found.low), 4)
    return Promise(
        psnr=_least(scores.to_plain, 2),
        ssim=_least(scores.ssim, 5),
        psnr_converged=_least(scores.to_converged, 2),
        alignment=share,
    )


def _least(values: Sequence[float], digits: int) -> float:
    mean, count = statistics.fmean(values), len(values)
    error = statistics.stdev(values) / count**0.5 if count > 1 else 0.0
    return round(mean - float(t.ppf(CONFIDENCE, count - 1)) * error if error else mean, digits)


def beats(scores: Sequence[float], other: Sequence[float]) -> bool:
    """Whether one run's pictures are better than another's by more than the standard error of the differences."""
    differences = [a - b for a, b in zip(scores, other, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return statistics.fmean(differences) > error
