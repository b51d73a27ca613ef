"""Depth-skip: leave out the inner U-Net on every step, for image-to-image (Kim et al., ACCV 2024, arXiv:2401.17547)."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field

from models.accelerators.base import Accelerator
from models.errors import OutOfRange
from models.networks.sites import level
from models.reuse.plans import StepPlan, Zeros
from models.spec import Family, ModelSpec, RunSpec


class DepthSkip(Accelerator):
    """Run `depth` input blocks and their output blocks; zeros stand in for everything deeper."""

    mode: Literal["depth_skip"] = "depth_skip"
    depth: int = Field(ge=1, description="How many input blocks run.")

    families: ClassVar[tuple[Family, ...]] = ("unet",)
    claims: ClassVar[frozenset[str]] = frozenset({"exit"})
    title: ClassVar[str] = "Leave out the inner U-Net on every step, with zeros in its place (image-to-image)."
    paper: ClassVar[str] = "https://arxiv.org/abs/2401.17547"

    def bind(self, model: ModelSpec, run: RunSpec) -> Self:
        """Check the depth against the U-Net's."""
        if self.depth > model.depth:
            raise OutOfRange("acceleration.depth", f"{self.depth} is not in 1..{model.depth} of {model.name}")
        return self

    def plan(self, step: int, num_steps: int) -> StepPlan:
        """An exit with zeros on every step."""
        return StepPlan({level(self.depth - 1): Zeros()})
