"""Adaptive DeepCache: a U-Net's rows decide for themselves when their deep features are to be computed anew."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field

from models.accelerators.gated import GatedCache
from models.errors import OutOfRange
from models.networks.sites import level
from models.reuse.gates import Gate
from models.reuse.plans import Gated, Recall, StepPlan
from models.spec import Family, ModelSpec, RunSpec


class AdaptiveDeepCache(GatedCache):
    """DeepCache with the first-block rule in place of a schedule: while the hidden state that enters input block
    branch + 1 is less than `threshold` away from what it was in the last full step, the remembered features stand in
    for everything deeper.
    """

    mode: Literal["adaptive_deepcache"] = "adaptive_deepcache"
    threshold: float = Field(0.2, gt=0.0, le=100.0, description="Reuse while the relative change is below this.")
    branch: int = Field(0, ge=0, description="Shallow steps run input blocks 0..branch and their output blocks.")

    families: ClassVar[tuple[Family, ...]] = ("unet",)
    claims: ClassVar[frozenset[str]] = frozenset({"exit"})
    title: ClassVar[str] = "Run only the outer levels of the U-Net while what they pass on changes little."
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.00858"

    def bind(self, model: ModelSpec, run: RunSpec) -> Self:
        """Check the branch against the U-Net's depth."""
        if self.branch >= model.depth:
            raise OutOfRange("acceleration.branch", f"{self.branch} is not in 0..{model.depth - 1} of {model.name}")
        return self

    def plan(self, step: int, num_steps: int) -> StepPlan:
        """The gate, in every step."""
        rule = Gate(self.threshold, "input", warmup=self.warmup, max_skips=self.max_skips, pair=self.pair)
        return StepPlan({level(self.branch): Gated(rule, Recall(self.order))})
