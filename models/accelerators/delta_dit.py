"""Δ-DiT: on cached steps a range of blocks adds its remembered effect (Chen et al., 2024, arXiv:2406.01125)."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, PrivateAttr

from models.accelerators.base import Accelerator
from models.errors import OutOfRange
from models.networks.sites import blocks
from models.reuse.plans import Recall, StepPlan
from models.spec import Family, ModelSpec, RunSpec


class DeltaDiT(Accelerator):
    """Early steps, which draw the outline, cache the rear blocks; later steps, which draw detail, the front blocks.

    A full step falls on every `interval`-th evaluation and on the switch at `boundary`, where the cached range changes
    and needs a fresh effect.
    """

    mode: Literal["delta_dit"] = "delta_dit"
    interval: int = Field(2, ge=1, le=1000, description="One full step in this many.")
    blocks: int | None = Field(None, ge=1, description="Cached blocks; default three quarters of the model's.")
    boundary: int | None = Field(
        None, ge=0, le=1000, description="Evaluation at which the cached range moves to the front; default half way."
    )
    order: int = Field(0, ge=0, le=4, description="0 repeats the effect; k foretells it from k + 1 full steps.")
    _depth: int = PrivateAttr(0)

    families: ClassVar[tuple[Family, ...]] = ("dit",)
    claims: ClassVar[frozenset[str]] = frozenset({"cached"})
    title: ClassVar[str] = "Between full steps, replace a range of transformer blocks by its remembered effect."
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.01125"

    def bind(self, model: ModelSpec, run: RunSpec) -> Self:
        """Fill in the defaults from the model's depth and the run's length."""
        blocks = self.blocks if self.blocks is not None else max(1, model.depth * 3 // 4)
        if blocks >= model.depth:
            raise OutOfRange("acceleration.blocks", f"{blocks} is not in 1..{model.depth - 1} of {model.name}")
        boundary = self.boundary if self.boundary is not None else run.num_steps // 2
        bound = self.model_copy(update={"blocks": blocks, "boundary": boundary})
        bound._depth = model.depth
        return bound

    def plan(self, step: int, num_steps: int) -> StepPlan:
        """A full step, or the cached range of this stage. Bound accelerators only."""
        if self.blocks is None or self.boundary is None or not self._depth:
            raise ValueError("bind the accelerator to a model first")
        if step % self.interval == 0 or step == self.boundary:
            return StepPlan()
        rear = blocks(self._depth - self.blocks, self._depth)
        return StepPlan({rear if step < self.boundary else blocks(0, self.blocks): Recall(self.order)})
