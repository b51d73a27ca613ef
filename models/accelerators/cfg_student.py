"""The guidance student: a LoRA distilled to predict in one row what guidance needs two for (arXiv:2312.00899)."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field

from models.accelerators.base import Accelerator
from models.errors import StudentConflict, cut
from models.reuse.plans import StepPlan
from models.spec import ModelSpec, RunSpec


class CfgStudent(Accelerator):
    """Run the conditional row only, with the adapter's low-rank term. Scale and negative prompt are baked in."""

    mode: Literal["cfg_student"] = "cfg_student"
    adapter: str | None = Field(None, description="A registered adapter; default the model's only one.")

    claims: ClassVar[frozenset[str]] = frozenset({"guidance", "adapter"})
    title: ClassVar[str] = "Replace the two guided rows by one row of a distilled LoRA student."
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.00899"

    def bind(self, model: ModelSpec, run: RunSpec) -> Self:
        """Look the adapter up and refuse what it has baked in differently."""
        students = model.students
        known = ", ".join(students) or "none"
        name = self.adapter or (next(iter(students)) if len(students) == 1 else None)
        if name is None:
            raise StudentConflict("acceleration.adapter", f"name one of the students of {model.name} ({known})")
        info = students.get(name)
        if info is None:
            kind = "a style, for the field loras" if name in model.adapters else f"no student of {model.name}"
            raise StudentConflict("acceleration.adapter", f"{cut(name)!r} is {kind} (registered: {known})")
        if run.guidance_scale is not None and run.guidance_scale != info.guidance_scale:
            reason = f"the student {name!r} was distilled at {info.guidance_scale:g}, not {run.guidance_scale:g}"
            raise StudentConflict(model.guided_by, reason)
        if run.negative:
            raise StudentConflict("negative_prompt", f"the student {name!r} has none; it cannot be set per request")
        return self.model_copy(update={"adapter": name})

    def plan(self, step: int, num_steps: int) -> StepPlan:
        """One conditional row under the adapter."""
        return StepPlan(guided=False, adapter=self.adapter)

    def unguided(self) -> bool:
        """A student has no unconditional row."""
        return True
