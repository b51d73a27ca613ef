"""A profile of a model under measurement: the one that it is shipped with, or a small one measured here and now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models import Request, generate
from models.accelerators import Forecast
from models.costs.macs import usage
from models.profiles import Candidate, Measure, Profile, pareto
from models.profiles.profile import Likeness as To
from models.quality.converged import SOLVER, STEPS, Converged
from models.quality.metrics import Likeness
from models.resolve import resolve
from models.shapes.judge import ShapesJudge
from tests.bench.harness import ROOT, elapsed, note
from tests.bench.zoo import Model

PLAIN_STEPS = 25
SCHEDULER = "ddim"
KEPT = ROOT / "runs" / "bench" / "converged"


def profile_of(model: Model, captions: int) -> Profile:
    """Shipped with the model for DDIM and 25 steps, or measured on so many held-out captions."""
    spec = model.backbone.spec
    size = (spec.native_width, spec.native_height)
    shipped = spec.profile(SCHEDULER, PLAIN_STEPS, *size)
    if shipped is not None and not shipped.differences(SCHEDULER, PLAIN_STEPS, *size):
        note(f"{model.name}: its own profile")
        return shipped
    note(f"{model.name}: measuring a profile on {captions} captions")
    return measure(model, captions)


def runs(prompt: str, seed: int) -> dict[str, Request]:
    """What is measured: the plain run, fewer plain steps of the best solver, forecasts at site `output`."""
    plain = Request(prompt=prompt, seed=seed, num_inference_steps=PLAIN_STEPS, scheduler=SCHEDULER)
    solver = {f"unipc-{n}": replace(plain, scheduler="unipc", num_inference_steps=n) for n in (16, 12, 10, 8, 6, 5)}
    foretold = {f"forecast-{n}": replace(plain, acceleration=Forecast(evaluations=n)) for n in (13, 10, 8)}
    return {"plain": plain, **solver, **foretold}


def measure(model: Model, captions: int) -> Profile:
    """Likeness, MACs and time of each of `runs`."""
    backbone, spec = model.backbone, model.backbone.spec
    pairs = [(caption, 5000 + i) for i, caption in enumerate(ShapesJudge().captions(captions))]
    by_name: dict[str, list[Request]] = {}
    for prompt, seed in pairs:
        for name, one in runs(prompt, seed).items():
            by_name.setdefault(name, []).append(one)
    converged = Converged(backbone, KEPT).pictures(by_name["plain"])
    plain = [result.images[0] for result in generate(backbone, by_name["plain"])]
    alone: Mapping[str, float] = {
        name: min(elapsed(lambda asked=asked: generate(backbone, asked[:1])) for _ in range(3))  # type: ignore[misc]
        for name, asked in by_name.items()
    }
    found = []
    for name, asked in by_name.items():
        pictures = [result.images[0] for result in generate(backbone, asked)]
        near, ideal = Likeness.of(pictures, plain), Likeness.of(pictures, converged)
        cost = usage(backbone, resolve(spec, backbone.scheduler_config, asked[0]))
        one = asked[0]
        found.append(
            Candidate(
                name=name,
                scheduler=str(one.scheduler),
                num_inference_steps=int(one.num_inference_steps or 0),
                acceleration=tuple(a.model_dump(mode="json", exclude_none=True) for a in one.accelerators),
                evaluations=cost.evaluations,
                macs=cost.macs,
                seconds=alone[name] / alone["plain"],
                psnr=Measure(mean=near.psnr, error=near.psnr_error or 0.0),
                ssim=Measure(mean=near.ssim),
                psnr_converged=Measure(mean=ideal.psnr, error=ideal.psnr_error or 0.0),
            )
        )
    fronts: dict[To, tuple[str, ...]] = {
        "plain": tuple(one.name for one in pareto(found, "plain")),
        "converged": tuple(one.name for one in pareto(found, "converged")),
    }
    facts: dict[str, Any] = {"model": spec.name, "config_hash": spec.config_hash, "scheduler": SCHEDULER}
    facts |= {"num_inference_steps": PLAIN_STEPS, "width": spec.native_width, "height": spec.native_height}
    facts |= {"guidance_scale": spec.default_guidance_scale, "reference_steps": STEPS, "fitted": 0}
    if "reference_scheduler" in Profile.model_fields:
        facts["reference_scheduler"] = SOLVER
    captioned = tuple(caption for caption, _ in pairs)
    made = {"captions": captioned, "plain": found[0], "candidates": tuple(found[1:]), "fronts": fronts}
    return Profile.model_validate(facts | made)
