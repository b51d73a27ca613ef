"""TeaCache: what enters the first block tells how far the output moves (Liu et al., CVPR 2025, arXiv:2411.19108)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, field_validator

from models.accelerators.base import as_tuple, check_site
from models.accelerators.fitted import fitted
from models.accelerators.gated import GatedCache
from models.networks.sites import blocks
from models.reuse.gates import Gate
from models.reuse.plans import Gated, Recall, StepPlan
from models.spec import Family, ModelSpec, RunSpec

Coefficient = Annotated[float, Field(ge=-1e9, le=1e9)]


class TeaCache(GatedCache):
    """All blocks are replaced by their remembered effect while the estimated change of the output adds up to less than
    `threshold`.

    The estimate is a polynomial of the relative change, from one step to the next, of the first block's input behind
    its normalisation and modulation by time. The last step is always computed.
    """

    mode: Literal["teacache"] = "teacache"
    threshold: float = Field(0.1, gt=0.0, le=100.0, description="Reuse while the estimated changes add up to less.")
    coefficients: tuple[Coefficient, ...] | None = Field(
        None,
        min_length=1,
        max_length=8,
        description="Of the polynomial, highest power first; default those of the model's profile.",
    )
    _listed = field_validator("coefficients", mode="before")(as_tuple)
    _depth: int = PrivateAttr(0)

    families: ClassVar[tuple[Family, ...]] = ("dit",)
    claims: ClassVar[frozenset[str]] = frozenset({"cached", "attention"})
    title: ClassVar[str] = "Reuse the effect of all blocks until the estimated change of the output adds up."
    paper: ClassVar[str] = "https://arxiv.org/abs/2411.19108"

    def bind(self, model: ModelSpec, run: RunSpec) -> Self:
        """Fill in the coefficients from the model's profile."""
        check_site(self, model, blocks(0, model.depth), "gated by modulated")
        coefficients = self.coefficients or fitted(model, run, "tea_coefficients", "coefficients")
        bound = self.model_copy(update={"coefficients": coefficients})
        bound._depth = model.depth
        return bound

    def plan(self, step: int, num_steps: int) -> StepPlan:
        """The gate, but for the last step. Bound accelerators only."""
        if self.coefficients is None or not self._depth:
            raise ValueError("bind the accelerator to a model first")
        if step == num_steps - 1:
            return StepPlan()
        rule = Gate(
            self.threshold,
            "modulated",
            refresh="always",
            accumulate=True,
            coefficients=self.coefficients,
            warmup=self.warmup,
            max_skips=self.max_skips,
            pair=self.pair,
        )
        return StepPlan({blocks(0, self._depth): Gated(rule, Recall(self.order))})
