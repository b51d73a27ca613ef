"""First-block cache: where the first block changed little, so did the others (ParaAttention; in diffusers)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

from pydantic import Field, PrivateAttr

from models.accelerators.base import check_site
from models.accelerators.gated import GatedCache
from models.errors import WrongBackbone
from models.networks.sites import blocks
from models.reuse.gates import Gate
from models.reuse.plans import Gated, Recall, StepPlan
from models.spec import Family, ModelSpec, RunSpec


class FirstBlockCache(GatedCache):
    """The first block always runs. While what it adds is at most `threshold` away from what it added in the last
    computed step, relative to that, the other blocks are replaced by their remembered effect.

    diffusers' hook takes one mean over its whole batch; here a batch is one row, or one guided pair.
    """

    mode: Literal["first_block_cache"] = "first_block_cache"
    threshold: float = Field(
        0.05, gt=0.0, le=100.0, description="Reuse while the first block's relative change is at most this."
    )
    _depth: int = PrivateAttr(0)

    families: ClassVar[tuple[Family, ...]] = ("dit",)
    claims: ClassVar[frozenset[str]] = frozenset({"cached", "attention"})
    title: ClassVar[str] = "Run the first block; while it changes little, reuse the effect of all others."
    paper: ClassVar[str] = "https://github.com/chengzeyi/ParaAttention"

    def bind(self, model: ModelSpec, run: RunSpec) -> Self:
        """Take the model's depth; a single block has no others to replace."""
        if model.depth < 2:
            raise WrongBackbone("acceleration.mode", f"{self.mode} needs two blocks, {model.name} has {model.depth}")
        check_site(self, model, blocks(1, model.depth), "gated by residual")
        bound = self.model_copy()
        bound._depth = model.depth
        return bound

    def plan(self, step: int, num_steps: int) -> StepPlan:
        """The gate, in every step. Bound accelerators only."""
        if not self._depth:
            raise ValueError("bind the accelerator to a model first")
        below = math.nextafter(self.threshold, math.inf)  # a change of just the threshold is reused, as in diffusers
        rule = Gate(below, "residual", warmup=self.warmup, max_skips=self.max_skips, pair=self.pair)
        return StepPlan({blocks(1, self._depth): Gated(rule, Recall(self.order))})
