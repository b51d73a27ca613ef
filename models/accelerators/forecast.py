"""Forecast: foretell the whole prediction on steps in between, from the last computed ones (after arXiv:2503.06923)."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from models.accelerators.base import Accelerator, as_tuple
from models.errors import NoProfile, OutOfRange
from models.profiles.profile import Schedule
from models.reuse.plans import Recall, StepPlan
from models.reuse.sites import OUTPUT
from models.reuse.weights import Basis
from models.spec import ModelSpec, RunSpec

Evaluation = Annotated[int, Field(ge=0, le=1000)]


class Forecast(Accelerator):
    """Between computed steps the network does not run: the scheduler follows a polynomial through the last predictions.

    Which steps are computed: every `interval`-th, or `evaluations` of them spread evenly over the run, or the `steps`
    given, or those of a `schedule` that `calibrate` found for this model. The first `warmup` are always computed, and
    so are steps at which guidance switches. As a foretold step costs nothing, the run may have more steps than it has
    evaluations.
    """

    mode: Literal["forecast"] = "forecast"
    interval: int | None = Field(None, ge=1, le=1000, description="One computed step in this many; default 2.")
    evaluations: int | None = Field(None, ge=1, le=1000, description="How many steps are computed, evenly spread.")
    steps: tuple[Evaluation, ...] | None = Field(
        None, min_length=1, max_length=1000, description="The computed steps, counted from 0; the first must be 0."
    )
    schedule: str | None = Field(
        None, max_length=120, description="A schedule of the model's profile; order and basis are its own by default."
    )
    order: int = Field(1, ge=0, le=4, description="Degree of the polynomial; 0 repeats the last prediction.")
    basis: Basis = Field(
        "newton", description="newton: through the values; taylor: finite differences; hermite: damped."
    )
    warmup: int = Field(1, ge=1, le=1000, description="First steps that are always computed.")
    _found: Schedule | None = PrivateAttr(None)
    _listed = field_validator("steps", mode="before")(as_tuple)

    claims: ClassVar[frozenset[str]] = frozenset({"output"})
    title: ClassVar[str] = (
        "Foretell the whole prediction between computed steps: no rows, and as fine a grid as wished."
    )
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.06923"

    @model_validator(mode="after")
    def _one_schedule(self) -> Self:
        given = [name for name in ("interval", "evaluations", "steps", "schedule") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of interval, evaluations, steps and schedule, not {' and '.join(given)}")
        if self.steps is not None and (list(self.steps) != sorted(set(self.steps)) or self.steps[0] != 0):
            raise ValueError("steps must begin with 0 and rise")
        return self

    def bind(self, model: ModelSpec, run: RunSpec) -> Self:
        """Hold the schedule against the run's evaluations."""
        most = run.num_steps
        if self.evaluations is not None and self.evaluations > most:
            raise OutOfRange("acceleration.evaluations", f"{self.evaluations} is not in 1..{most} of this run")
        if self.steps is not None and self.steps[-1] >= most:
            raise OutOfRange("acceleration.steps", f"{self.steps[-1]} is not in 0..{most - 1} of this run")
        return self if self.schedule is None else self._scheduled(self.schedule, model, run)

    def _scheduled(self, name: str, model: ModelSpec, run: RunSpec) -> Self:
        """With the steps, and by default the order and basis, of a schedule that was found for such a run."""
        profiles = [profile for profile in model.profiles.values() if profile.scheduler == run.scheduler]
        here = {key: schedule for profile in profiles for key, schedule in profile.schedules.items()}
        found = here.get(name)
        if found is None:
            known = ", ".join(here) or "none"
            reason = f"{model.name} has no schedule {name!r} for {run.scheduler} (found by calibrate: {known})"
            raise NoProfile("acceleration.schedule", reason)
        facts = {
            "num_inference_steps": (found.num_inference_steps, run.num_inference_steps),
            "steps": (found.num_steps, run.num_steps),
            "timestep_warp": (1.0, run.timestep_warp),
        }
        for fact, (wanted, given) in facts.items():
            if wanted != given:
                reason = f"{fact}: the schedule is for {wanted}, the request has {given}"
                raise NoProfile("acceleration.schedule", reason)
        own = {"order": found.order, "basis": found.basis}
        bound = self.model_copy(update={key: own[key] for key in own.keys() - self.model_fields_set})
        bound._found = found
        return bound

    def plan(self, step: int, num_steps: int) -> StepPlan:
        """A computed step, or its prediction foretold."""
        if step < self.warmup or self._computed(step, num_steps):
            return StepPlan()
        return StepPlan({OUTPUT: Recall(self.order, self.basis)})

    def _computed(self, step: int, num_steps: int) -> bool:
        if self.schedule is not None and self._found is None:
            raise ValueError("bind the accelerator to a model first")
        steps = self.steps if self._found is None else self._found.steps
        if steps is not None:
            return step in steps
        if self.evaluations is not None:
            return step in spread(self.evaluations, num_steps)
        return step % (self.interval or 2) == 0


@lru_cache(maxsize=256)
def spread(count: int, num_steps: int) -> frozenset[int]:
    """`count` steps of a run, the first and the last among them, as even as whole numbers allow."""
    last = max(count - 1, 1)
    return frozenset((2 * i * (num_steps - 1) + last) // (2 * last) for i in range(count))
