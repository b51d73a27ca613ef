"""Selective guidance: two rows only on a stretch of the run (Golnari et al., Microsoft 2023, arXiv:2305.11675)."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from models.accelerators.base import Accelerator
from models.reuse.plans import StepPlan


class SelectiveGuidance(Accelerator):
    """Guide the steps in [start, stop), given as fractions of the run; elsewhere run the conditional row alone."""

    mode: Literal["selective_guidance"] = "selective_guidance"
    start: float = Field(0.0, ge=0.0, lt=1.0, description="Fraction of the run at which guidance begins.")
    stop: float = Field(0.8, gt=0.0, le=1.0, description="Fraction of the run at which guidance ends.")

    claims: ClassVar[frozenset[str]] = frozenset({"guidance"})
    title: ClassVar[str] = "Guide only a stretch of the run; elsewhere one row instead of two."
    paper: ClassVar[str] = "https://arxiv.org/abs/2305.11675"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.start >= self.stop:
            raise ValueError("start must be below stop")
        return self

    def plan(self, step: int, num_steps: int) -> StepPlan:
        """Guided inside the stretch, not outside."""
        return StepPlan(guided=self.start <= step / num_steps < self.stop)
