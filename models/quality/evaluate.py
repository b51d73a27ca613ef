"""Running accelerators and their controls over many captions and seeds, and measuring what came out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from models.backbone import Backbone
from models.errors import RequestError
from models.generate import generate
from models.quality import metrics
from models.quality.cases import Acceleration, Case, cases, cost, defaults
from models.quality.converged import NOISY, STEPS, Converged
from models.quality.judge import Judge
from models.quality.metrics import Likeness
from models.resolve import resolve

REFERENCES = 2048  # rendered pictures behind every Fréchet distance
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Score:
    """One line of the table. Rows, MACs and seconds are those of one picture; `speedup` is the wall ratio.

    `to_plain` compares with the unaccelerated picture of the same seed (None: it is that), `to_converged` with the one
    of very many steps (None: the scheduler does not converge); `alignment` is the share of pictures that keep each
    claim of their caption; it and `frechet` are None without a judge or outside its world.
    """

    case: Case
    evaluations: int
    rows: int
    macs: int
    mac_ratio: float
    seconds: float
    speedup: float
    to_plain: Likeness | None
    to_converged: Likeness | None
    alignment: dict[str, float] | None
    frechet: float | None


@dataclass(frozen=True)
class Evaluation:
    """All lines, and the first pictures of every run under the same seeds for the contact sheet."""

    model: str
    pictures: int
    captions: list[str]
    device: str
    dtype: str
    scheduler: str
    converged_steps: int | None  # of the converged pictures; None where the scheduler has none
    scores: list[Score]
    samples: list[list[Image.Image]] = field(repr=False)


@dataclass
class _Run:
    """What one case has made so far."""

    case: Case
    pictures: list[Image.Image] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # one a chunk


def evaluate(
    backbone: Backbone,
    accelerations: Sequence[Acceleration] = (),
    *,
    captions: int | Sequence[str] = 64,
    judge: Judge | None = None,
    seeds: int = 1,
    num_inference_steps: int | None = None,
    scheduler: str | None = None,
    converged: Path | None = None,
    chunk: int = 32,
    samples: int = 10,
    progress: Progress | None = None,
) -> Evaluation:
    """Draw every caption with every seed under each acceleration and control, and measure.

    `captions` is how many held-out captions of the judge's world to draw, or the prompts themselves. The runs take
    turns after every `chunk` pictures, so that a machine that slows down slows them all. Without `accelerations`, those
    that fit the model. Converged pictures are drawn once and kept in the folder `converged` for the next evaluation.
    Raises a `RequestError` for an acceleration that does not fit.
    """
    prompts = _prompts(backbone, captions, judge)
    pairs = [(prompt, 1000 * seed + i) for seed in range(seeds) for i, prompt in enumerate(prompts)]
    steps = num_inference_steps or backbone.spec.default_steps
    chosen = cases(backbone, accelerations or defaults(backbone.spec), steps, scheduler)
    plain = chosen[0]
    runs = {_key(case): _Run(case) for case in chosen}
    kept = None if plain.scheduler in NOISY else Converged(backbone, converged)
    ideals: list[Image.Image] = []
    generate(backbone, [plain.request(*pairs[0])])  # warm
    done, total = 0, len(pairs) * (len(runs) + (kept is not None))

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for start in range(0, len(pairs), chunk):
        part = pairs[start : start + chunk]
        requests = [plain.request(prompt, seed) for prompt, seed in part]
        backbone.prepare([resolve(backbone.spec, backbone.scheduler_config, request) for request in requests])
        if kept is not None:
            ideals += kept.pictures(requests)
            advance(len(part))
        for run in runs.values():
            began = time.perf_counter()
            results = generate(backbone, [run.case.request(prompt, seed) for prompt, seed in part])
            run.seconds.append(time.perf_counter() - began)
            run.pictures += [result.images[0] for result in results]
            advance(len(part))
    drawn = [prompt for prompt, _ in pairs]
    scorer = _Scorer(drawn, runs[_key(plain)], ideals, cost(backbone, plain).macs, judge)
    return Evaluation(
        model=backbone.spec.name,
        pictures=len(pairs),
        captions=drawn[:samples],
        device=str(backbone.device),
        dtype=str(backbone.dtype).removeprefix("torch."),
        scheduler=str(plain.scheduler),
        converged_steps=None if kept is None else STEPS,
        scores=[scorer.score(case, runs[_key(case)], backbone) for case in chosen],
        samples=[runs[_key(case)].pictures[:samples] for case in chosen],
    )


def _key(case: Case) -> tuple[object, ...]:
    """Cases that make the same pictures are run once."""
    return (case.num_inference_steps, case.accelerators, case.guidance_scale, case.scheduler)


def _prompts(backbone: Backbone, captions: int | Sequence[str], judge: Judge | None) -> list[str]:
    if not isinstance(captions, int):
        return list(captions)
    if judge is None or backbone.spec.prompt_grammar is None:
        raise RequestError("captions", f"{backbone.spec.name} does not say what it draws; give prompts to evaluate")
    return judge.captions(captions)


class _Scorer:
    """Scores runs against the plain and the converged pictures and, in the judge's world, captions and true ones."""

    def __init__(
        self, captions: list[str], plain: _Run, converged: list[Image.Image], macs: int, judge: Judge | None
    ) -> None:
        self._captions, self._plain, self._converged, self._macs = captions, plain, converged, macs
        self._judge = judge if judge is not None and judge.reads(plain.pictures, captions) else None
        self._reference = None
        if self._judge is not None:
            self._reference = self._judge.features(self._judge.true_pictures(captions, REFERENCES))

    def score(self, case: Case, run: _Run, backbone: Backbone) -> Score:
        usage = cost(backbone, case)
        plain = case.kind == "baseline"
        ratios = [a / b for a, b in zip(self._plain.seconds, run.seconds, strict=True)]
        return Score(
            case=case,
            evaluations=usage.evaluations,
            rows=usage.rows,
            macs=usage.macs,
            mac_ratio=self._macs / usage.macs,
            seconds=sum(run.seconds) / len(run.pictures),
            speedup=statistics.median(ratios),
            to_plain=None if plain else Likeness.of(run.pictures, self._plain.pictures),
            to_converged=Likeness.of(run.pictures, self._converged) if self._converged else None,
            alignment=None if self._judge is None else self._judge.alignment(run.pictures, self._captions),
            frechet=self._frechet(run.pictures),
        )

    def _frechet(self, pictures: list[Image.Image]) -> float | None:
        if self._judge is None or self._reference is None or len(pictures) < 2:
            return None
        features = self._judge.features(pictures)
        return None if features is None else metrics.frechet(features, self._reference)
