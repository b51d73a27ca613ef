"""Which runs an evaluation makes: each acceleration, and beside it the controls that keep it honest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from models.accelerators import (
    Accelerator,
    CfgStudent,
    DeepCache,
    DeltaDiT,
    DiTFastAttn,
    Forecast,
    SelectiveGuidance,
)
from models.backbone import Backbone
from models.costs.macs import Usage, usage
from models.request import Request, Run
from models.resolve import resolve
from models.reuse.plans import StepPlan, Zeros
from models.spec import ModelSpec

Kind = Literal["baseline", "unguided", "teacher", "accelerated", "same_macs", "best_solver", "zeros", "full_steps"]
Acceleration = Sequence[Accelerator]
BEST_SOLVERS = ("unipc", "dpmpp_2m", "ddim")
"""Best first: which solver a plain run of few steps should take, where the model offers it."""


@dataclass(frozen=True)
class Case:
    """One run of the evaluation. `of` is the acceleration that a control belongs to, by its label."""

    label: str
    kind: Kind
    num_inference_steps: int
    accelerators: tuple[Accelerator, ...] = ()
    guidance_scale: float | None = None
    of: str | None = None
    scheduler: str | None = None

    def request(self, prompt: str, seed: int) -> Request:
        """This run for one picture."""
        return Request(
            prompt=prompt,
            seed=seed,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            scheduler=self.scheduler,
            acceleration=self.accelerators,
        )


class ZerosInMemory(DeepCache):
    """Negative control of DeepCache: zeros where it would put the remembered features. Never offered to requests."""

    def plan(self, step: int, num_steps: int) -> StepPlan:
        """DeepCache's plan, with zeros in place of what it recalls."""
        return StepPlan(dict.fromkeys(super().plan(step, num_steps).reuse, Zeros()))


def cases(
    backbone: Backbone,
    accelerations: Sequence[Acceleration],
    num_inference_steps: int,
    scheduler: str | None = None,
) -> list[Case]:
    """The baseline, each acceleration and its controls, in the order of the table.

    Raises a `RequestError` for an acceleration that does not fit the model or the run.
    """
    plain = Case("plain", "baseline", num_inference_steps, scheduler=scheduler or backbone.spec.default_scheduler)
    found = [plain]
    for acceleration in accelerations:
        case = replace(plain, label=label(acceleration), kind="accelerated", accelerators=tuple(acceleration))
        found += [case, *_same_macs(backbone, plain, case)]
        if any(isinstance(accelerator, CfgStudent) for accelerator in acceleration):
            found += [one for one in _guidance(backbone, plain, case) if one.label not in {old.label for old in found}]
        for accelerator in acceleration:
            if isinstance(accelerator, DeepCache):
                found += _deepcache(case, accelerator)
    return found


def cost(backbone: Backbone, case: Case) -> Usage:
    """Steps, rows and MACs of one picture, without making it."""
    return usage(backbone, _resolve(backbone, case))


def _resolve(backbone: Backbone, case: Case) -> Run:
    return resolve(backbone.spec, backbone.scheduler_config, case.request(_any_prompt(backbone), 0))


def label(acceleration: Acceleration) -> str:
    """An acceleration in the grammar of the command line, as it was written."""
    return "+".join(_label(accelerator) for accelerator in acceleration) or "none"


def defaults(spec: ModelSpec) -> list[Acceleration]:
    """What is evaluated of a model where nothing is named: every accelerator for text-to-image, at a few settings."""
    runs: list[Acceleration] = [[Forecast(interval=2)], [Forecast(interval=3)]]
    runs += [[SelectiveGuidance(stop=stop)] for stop in (0.8, 0.5)]
    students = [[CfgStudent(adapter=name)] for name in spec.students]
    if spec.family == "unet":
        caches: list[Accelerator] = [
            DeepCache(interval=2),
            DeepCache(interval=3),
            DeepCache(interval=5),
            DeepCache(interval=5, branch=1),
            DeepCache(interval=2, order=1),
        ]
    else:
        caches = [DeltaDiT(interval=2), DeltaDiT(interval=3), DeltaDiT(interval=2, order=1)]
        caches += [DiTFastAttn.model_validate({"plan": name}) for name in spec.plans]
    runs = [[cache] for cache in caches] + runs + [list(student) for student in students]
    return runs + [[*student, caches[0]] for student in students]


def best_solver(spec: ModelSpec) -> str:
    """The solver that makes the most of few plain steps, of those that the model offers."""
    return next((name for name in BEST_SOLVERS if name in spec.schedulers), spec.default_scheduler)


def _same_macs(backbone: Backbone, plain: Case, case: Case) -> list[Case]:
    """As many plain steps as the acceleration's MACs pay for, rounded down: of the same solver, and of the best one."""
    found = [_plain(backbone, plain, case)]
    best = best_solver(backbone.spec)
    if best != plain.scheduler:
        other = _plain(backbone, replace(plain, scheduler=best), case)
        found.append(replace(other, kind="best_solver", label=f"{other.label} of {best}"))
    return found


def _plain(backbone: Backbone, plain: Case, case: Case) -> Case:
    """The most plain steps of a solver that cost no more than `case`. Some solvers evaluate a step twice."""
    budget, full = cost(backbone, case).macs, cost(backbone, plain)
    steps = max(1, budget * full.steps // full.macs)
    control = replace(plain, kind="same_macs", of=case.label, num_inference_steps=steps)
    while steps > 1 and cost(backbone, control).macs > budget:
        steps -= 1
        control = replace(control, num_inference_steps=steps)
    return replace(control, label=f"{steps} plain step{'s' * (steps > 1)}")


def _guidance(backbone: Backbone, plain: Case, case: Case) -> list[Case]:
    """What a student stands between: no guidance, and its teacher, where that is not the plain run itself."""
    scale = _resolve(backbone, case).guidance_scale
    found = [replace(plain, label="no guidance", kind="unguided", guidance_scale=1.0, of=case.label)]
    if scale != backbone.spec.default_guidance_scale:
        found.append(replace(plain, label=f"guided at {scale:g}", kind="teacher", guidance_scale=scale, of=case.label))
    return found


def _deepcache(case: Case, cache: DeepCache) -> list[Case]:
    zeros = ZerosInMemory(**cache.model_dump())
    accelerators = tuple(zeros if accelerator is cache else accelerator for accelerator in case.accelerators)
    steps = case.num_inference_steps
    full = sum(not cache.plan(step, steps).reuse for step in range(steps))
    others = tuple(accelerator for accelerator in case.accelerators if accelerator is not cache)
    return [
        replace(case, label="zeros in place of the memory", kind="zeros", accelerators=accelerators, of=case.label),
        replace(
            case,
            label=f"the {full} full step{'s' * (full > 1)} alone",
            kind="full_steps",
            num_inference_steps=full,
            accelerators=others,
            of=case.label,
        ),
    ]


def _label(accelerator: Accelerator) -> str:
    values = accelerator.model_dump(by_alias=True, exclude_unset=True, exclude={"mode"})
    settings = ",".join(f"{key}={value}" for key, value in values.items() if isinstance(value, str | int | float))
    return f"{accelerator.mode}:{settings}" if settings else accelerator.mode


def _any_prompt(backbone: Backbone) -> str:
    return next(iter(backbone.spec.examples), "a picture")
