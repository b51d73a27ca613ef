"""TaylorSeer: foretell what every attention and feed-forward gives from its last results (arXiv:2503.06923)."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, PrivateAttr

from models.accelerators.base import Accelerator, check_site
from models.networks.sites import MODULES, feed_forward
from models.reuse.plans import Recall, StepPlan
from models.reuse.sites import Site
from models.reuse.weights import Basis
from models.spec import Family, ModelSpec, RunSpec


class TaylorSeer(Accelerator):
    """Between full steps every attention and feed-forward is foretold; what lies around them, the normalisations, gates
    and additions, still runs. Where a block has both side by side, their common projection is.

    The first `warmup` steps are full, then every `interval`-th, counted as diffusers' `TaylorSeerCacheConfig` counts:
    step `warmup` itself is foretold, and warmup + 1, warmup + 1 + interval, … are full. A row remembers order + 1
    tensors of each module: on 28 blocks with cross-attention 168 at order 1, where `forecast` has two predictions.
    """

    mode: Literal["taylorseer"] = "taylorseer"
    interval: int = Field(5, ge=1, le=1000, description="One full step in this many, after the first ones.")
    order: int = Field(1, ge=0, le=4, description="Of the expansion; 0 repeats the last results.")
    warmup: int = Field(3, ge=1, le=1000, description="First steps that are always full.")
    basis: Basis = Field(
        "taylor", description="newton: through the values; taylor: finite differences; hermite: damped."
    )
    _modules: tuple[Site, ...] = PrivateAttr(())

    families: ClassVar[tuple[Family, ...]] = ("dit",)
    claims: ClassVar[frozenset[str]] = frozenset({"attention", "cached"})
    title: ClassVar[str] = "Between full steps, foretell the result of every attention and feed-forward."
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.06923"

    def bind(self, model: ModelSpec, run: RunSpec) -> Self:
        """Find the modules of the model's blocks."""
        check_site(self, model, feed_forward(0), "recall")
        every = (Site(kind, k) for k in range(model.depth) for kind in MODULES)
        bound = self.model_copy()
        bound._modules = tuple(site for site in every if "recall" in model.sites.understands(site))
        return bound

    def plan(self, step: int, num_steps: int) -> StepPlan:
        """A full step, or all modules foretold. Bound accelerators only."""
        if not self._modules:
            raise ValueError("bind the accelerator to a model first")
        if step < self.warmup or (step - self.warmup - 1) % self.interval == 0:
            return StepPlan()
        return StepPlan(dict.fromkeys(self._modules, Recall(self.order, self.basis)))
