"""Calibrate: measure what every way to draw a picture costs and gives, and find the steps worth computing.

A quarter of the prompts fits: their plain runs of very many steps are recorded, and masks are proposed from inner
products (`models.search.masks`). A quarter chooses: every proposal is run on them and held against the plain picture
and the converged one of the same seed (`models.search.measuring`). The best of many is best by chance, too, so the half
that is left checks what may be promised of the fronts: these prompts choose nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as File

from models.accelerators import Forecast
from models.accelerators.forecast import spread
from models.backbone import Backbone
from models.errors import RequestError
from models.profiles import Likeness, Profile, Schedule, pareto
from models.quality.judge import Judge
from models.request import Request, Run, digest
from models.resolve import least_request, resolve
from models.search.fitting import can_fit, fit
from models.search.kept import Kept
from models.search.masks import Path
from models.search.measuring import CHUNK, Measuring, Scores, beats, candidate, promise
from models.search.proposals import (
    FINER,
    SOLVERS,
    Proposal,
    caches,
    even_forecasts,
    searched_forecasts,
    solvers,
    under,
)
from models.search.recording import record
from models.solvers.probe import NotLinear
from models.solvers.tables import table

REFERENCE_STEPS = 200
REFERENCE = ("dpmpp_2m",)
"""Solvers whose converged picture stands for all: at 200 steps it and DDIM's are alike to 57 dB on a bundled model."""
CHECKED = "checked-"
"""Before the names of what is kept of the prompts that check."""
Progress = Callable[[int, int, str], None]
"""Called with (runs done, runs in all as far as is known, the one that is next)."""


def calibrate(
    backbone: Backbone,
    prompts: Sequence[str],
    *,
    scheduler: str | None = None,
    num_inference_steps: int | None = None,
    width: int | None = None,
    height: int | None = None,
    seed: int = 0,
    reference_steps: int = REFERENCE_STEPS,
    judge: Judge | None = None,
    checkpoint: File | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.process_time,
) -> Profile:
    """Measure a model at one scheduler, number of steps and size; 64 prompts drawn as users draw them are enough.

    Picture `i` is drawn from `seed + i`. With `checkpoint`, a folder, what is measured is kept there, and a later call
    with the same arguments goes on from it. `clock` times the runs; by default it is the processor's time, which other
    work on the machine blurs least. Raises a `RequestError` for fewer than four prompts, a scheduler that draws noise
    on the way, or a checkpoint of another calibration.
    """
    spec = backbone.spec
    common = {"scheduler": scheduler, "width": width, "height": height}
    run = resolve(
        spec,
        backbone.scheduler_config,
        least_request(spec, **common, num_inference_steps=num_inference_steps or spec.default_steps),
    )
    _check(backbone, prompts, run)
    reference = next((name for name in REFERENCE if name in spec.schedulers), run.scheduler), reference_steps
    requests = [
        Request(prompt=text, seed=seed + i, width=run.width, height=run.height) for i, text in enumerate(prompts)
    ]
    fitted = len(prompts) // 4
    chosen, checked = requests[fitted : 2 * fitted], requests[2 * fitted :]
    kept = Kept(
        checkpoint,
        {
            "model": [spec.config_hash, backbone.digest, str(backbone.dtype)],
            "adapters": {name: backbone.adapters.digest(info) for name, info in sorted(backbone.spec.students.items())},
            "run": [run.scheduler, run.num_inference_steps, run.width, run.height, run.guidance_scale],
            "reference": list(reference),
            "requests": digest(requests),
        },
    )
    work = _Work(kept, progress)
    plain = Proposal("plain", run.scheduler, run.num_inference_steps)
    converged = Proposal("converged", *reference)
    work.says("recording")
    path = kept.path(lambda: _recorded(backbone, requests[:fitted], reference))
    choosing = work.measuring(Measuring(backbone, chosen, judge, clock), converged, plain)
    work.says("searching")
    grids = [run.num_inference_steps * finer for finer in FINER]
    fitting = [
        replace(request, scheduler=run.scheduler, num_inference_steps=run.num_inference_steps)
        for request in requests[:fitted][:CHUNK]
    ]
    found = kept.fit(lambda: fit(backbone, fitting)) if can_fit(backbone, len(run.steps)) else None
    proposals = [
        plain,
        *solvers(spec, run.scheduler, len(run.steps)),
        *_forecasts(backbone, run, run.scheduler, grids, path),
        *caches(spec, run.scheduler, run.num_inference_steps, found),
    ]
    for solver in SOLVERS[:1]:
        if solver != run.scheduler and solver in spec.schedulers:
            proposals += [under(solver, one) for one in _forecasts(backbone, run, solver, grids, path)]
    proposals = list({proposal.name: proposal for proposal in proposals}.values())
    scores = work.measure(choosing, proposals)
    lines = [candidate(one, scores[one.name], scores[plain.name].seconds) for one in proposals]
    wanted: tuple[Likeness, ...] = ("plain", "converged")
    fronts = {to: tuple(one.name for one in pareto(lines, to)) for to in wanted}
    best = {plain.name, *(name for names in fronts.values() for name in names)}
    checking = work.measuring(Measuring(backbone, checked, judge, clock), converged, plain, CHECKED)
    true = work.measure(checking, [one for one in proposals if one.name in best], CHECKED)
    promised = {name: promise(one) for name, one in true.items()}
    lines = [one.model_copy(update={"promise": promised.get(one.name)}) for one in lines]
    return Profile(
        model=spec.name,
        config_hash=spec.config_hash,
        scheduler=run.scheduler,
        num_inference_steps=run.num_inference_steps,
        width=run.width,
        height=run.height,
        guidance_scale=run.guidance_scale,
        reference_scheduler=reference[0],
        reference_steps=reference[1],
        captions=tuple(prompts),
        fitted=fitted,
        checked=len(checked),
        seed=seed,
        plain=lines[0],
        candidates=tuple(lines[1:]),
        fronts=fronts,
        schedules=_chosen(proposals, scores, run),
        mag_ratios=() if found is None else found.mag_ratios,
        tea_coefficients=() if found is None else found.tea_coefficients,
    )


def _forecasts(backbone: Backbone, run: Run, scheduler: str, grids: Sequence[int], path: Path) -> Iterator[Proposal]:
    """Forecasts under a solver, of as many evaluations as are tried for this run, on some numbers of steps."""
    size = {"scheduler": scheduler, "width": run.width, "height": run.height}
    schedules = {
        grid: resolve(
            backbone.spec, backbone.scheduler_config, least_request(backbone.spec, **size, num_inference_steps=grid)
        ).schedule
        for grid in grids
    }
    lengths = {grid: len(schedule.timesteps) for grid, schedule in schedules.items()}
    yield from even_forecasts(scheduler, len(run.steps), lengths)
    yield from searched_forecasts(scheduler, len(run.steps), schedules, path)


def _check(backbone: Backbone, prompts: Sequence[str], run: Run) -> None:
    if len(prompts) < 4:
        raise RequestError("prompts", f"{len(prompts)} is too few: some fit, some choose, some check; give 4 or more")
    if backbone.spec.takes != "prompt" or backbone.spec.asks_for_embeddings:
        raise RequestError("model", f"{backbone.spec.name} does not take prompts as text, which calibrate draws")
    try:
        noisy = any(table(run.schedule).draws)
    except NotLinear as error:
        raise RequestError("scheduler", f"{run.scheduler} cannot be calibrated: {error}") from error
    if noisy:
        raise RequestError("scheduler", f"{run.scheduler} draws noise on the way, so its pictures do not converge")


def _recorded(backbone: Backbone, requests: Sequence[Request], reference: tuple[str, int]) -> Path:
    """The mean path of plain reference runs."""
    scheduler, steps = reference
    wanted = [replace(request, scheduler=scheduler, num_inference_steps=steps) for request in requests]
    parts = [wanted[start : start + CHUNK] for start in range(0, len(wanted), CHUNK)]
    paths = [record(backbone, part)[0] for part in parts]
    grams = [path.gram * len(part) for path, part in zip(paths, parts, strict=True)]
    return replace(paths[0], gram=sum(grams[1:], grams[0]) / len(wanted))


def _chosen(proposals: Sequence[Proposal], scores: Mapping[str, Scores], run: Run) -> dict[str, Schedule]:
    """For each number of evaluations on each grid of the run's solver the schedule to take: the even one, unless
    another beats it.

    On the plain run's own grid by likeness to the plain picture, on finer ones to the converged one.
    """
    groups: dict[tuple[str, int, int], list[Proposal]] = {}
    for proposal in proposals:
        if proposal.group is not None and proposal.scheduler == run.scheduler:
            groups.setdefault(proposal.group, []).append(proposal)

    def values(proposal: Proposal) -> Sequence[float]:
        own = scores[proposal.name]
        return own.to_plain if proposal.num_inference_steps == run.num_inference_steps else own.to_converged

    found = {}
    for (_, count, length), members in groups.items():
        even = max((one for one in members if one.even), key=lambda one: sum(values(one)))
        best = max(members, key=lambda one: sum(values(one)))
        winner = best if beats(values(best), values(even)) else even
        [forecast] = winner.acceleration
        if isinstance(forecast, Forecast):
            mask = forecast.steps or tuple(sorted(spread(count, length)))
            found[f"{count}of{length}"] = Schedule(
                num_inference_steps=winner.num_inference_steps, num_steps=length, steps=mask, order=forecast.order
            )
    return found


@dataclass
class _Work:
    """The runs to measure, one after another."""

    kept: Kept
    progress: Progress | None
    done: int = 0
    total: int = 0

    def says(self, note: str) -> None:
        """Tell what is next."""
        if self.progress is not None:
            self.progress(self.done, self.total, note)

    def measuring(self, bare: Measuring, converged: Proposal, plain: Proposal, kind: str = "") -> Measuring:
        """With the pictures to compare with."""
        self.says(f"{kind}converged")
        bare.converged = self.kept.pictures(f"{kind}converged", lambda: bare.draw(converged)[0])
        self.says(f"{kind}plain")
        bare.plain = self.kept.pictures(f"{kind}plain", lambda: bare.draw(plain)[0])
        return bare

    def measure(self, measuring: Measuring, proposals: Sequence[Proposal], kind: str = "") -> dict[str, Scores]:
        """The scores of each, by name."""
        self.total += len(proposals)
        for proposal in proposals:
            name = f"{kind}{proposal.name}"
            self.says(name)
            if name not in self.kept.scores:
                self.kept.add(name, measuring.score(proposal))
            self.done += 1
        self.says("done")
        return {proposal.name: self.kept.scores[f"{kind}{proposal.name}"] for proposal in proposals}
