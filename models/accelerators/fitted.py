"""Numbers that belong to a model and are fitted by `calibrate`: looked up in the profiles registered with it."""

from __future__ import annotations

from typing import Literal

from models.errors import NoProfile
from models.spec import ModelSpec, RunSpec

Fitted = Literal["mag_ratios", "tea_coefficients"]


def fitted(model: ModelSpec, run: RunSpec, what: Fitted, field: str) -> tuple[float, ...]:
    """What the profiles of a model hold for this scheduler, of the one nearest in steps.

    Raises `NoProfile`, which names the request's `field` and the command that makes a profile.
    """
    having = [p for p in model.profiles.values() if p.scheduler == run.scheduler and getattr(p, what)]
    if not having:
        raise NoProfile(
            f"acceleration.{field}",
            f"no profile of {model.name} has them for {run.scheduler}; give them, or make one with "
            f"`slipstream calibrate --model {model.name} --scheduler {run.scheduler}` (of 8 steps or more)",
        )
    nearest = min(having, key=lambda p: (abs(p.num_inference_steps - run.num_inference_steps), p.num_inference_steps))
    return tuple(getattr(nearest, what))
