"""MagCache: how much the blocks' effect grows from step to step is a law of the model (Ma et al., arXiv:2506.09045)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, field_validator

from models.accelerators.base import Accelerator, as_tuple
from models.accelerators.fitted import fitted
from models.networks.sites import blocks
from models.reuse.plans import Recall, StepPlan
from models.spec import Family, ModelSpec, RunSpec

Ratio = Annotated[float, Field(gt=0.0, le=1e6)]


class MagCache(Accelerator):
    """All blocks are replaced by their remembered effect while the growth that this misses adds up to `threshold`.

    `ratios` say for every step how much larger the effect's magnitude is than in the step before. They are known before
    a run, so which steps are skipped is too: nothing is decided while it runs. diffusers' hook adds up in float32,
    this in float64.
    """

    mode: Literal["magcache"] = "magcache"
    threshold: float = Field(0.06, gt=0.0, le=100.0, description="Reuse while the error estimated adds up to this.")
    max_skips: int = Field(3, ge=1, le=1000, description="Most steps in a row that reuse.")
    retention: float = Field(0.2, ge=0.0, le=1.0, description="First part of the run that is always computed.")
    order: int = Field(0, ge=0, le=4, description="0 repeats the effect; k foretells it from k + 1 full steps.")
    ratios: tuple[Ratio, ...] | None = Field(
        None, min_length=1, max_length=1000, description="Of magnitudes, one a step; default the model's profile's."
    )
    _listed = field_validator("ratios", mode="before")(as_tuple)
    _depth: int = PrivateAttr(0)

    families: ClassVar[tuple[Family, ...]] = ("dit",)
    claims: ClassVar[frozenset[str]] = frozenset({"cached"})
    title: ClassVar[str] = "Reuse the effect of all blocks where the model's known magnitudes say that it lasts."
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.09045"

    def bind(self, model: ModelSpec, run: RunSpec) -> Self:
        """Fill in the ratios from the model's profile."""
        bound = self.model_copy(update={"ratios": self.ratios or fitted(model, run, "mag_ratios", "ratios")})
        bound._depth = model.depth
        return bound

    def plan(self, step: int, num_steps: int) -> StepPlan:
        """A full step, or the effect of all blocks. Bound accelerators only."""
        if self.ratios is None or not self._depth:
            raise ValueError("bind the accelerator to a model first")
        skipped = skipped_steps(self.ratios, num_steps, self.threshold, self.max_skips, self.retention)
        return StepPlan({blocks(0, self._depth): Recall(self.order)} if step in skipped else {})


@lru_cache(maxsize=256)
def skipped_steps(
    ratios: tuple[float, ...], num_steps: int, threshold: float, max_skips: int, retention: float
) -> frozenset[int]:
    """The steps that reuse. The magnitude's growth since the last computed step is multiplied up, and how far it is
    from 1 is added up; a step that would pass a limit is computed, and both begin anew.

    >>> sorted(skipped_steps((1.0,) * 6, 6, 0.06, 3, 0.2))
    [1, 2, 3, 5]
    """
    found: set[int] = set()
    growth, error, steps = 1.0, 0.0, 0
    for step, ratio in enumerate(stretched(ratios, num_steps)):
        if step < int(retention * num_steps + 0.5):
            continue
        growth, steps = growth * ratio, steps + 1
        error += abs(1.0 - growth)
        if step > 0 and error <= threshold and steps <= max_skips:
            found.add(step)
        else:
            growth, error, steps = 1.0, 0.0, 0
    return frozenset(found)


def stretched(ratios: Sequence[float], length: int) -> tuple[float, ...]:
    """Ratios for another number of steps: the nearest ones, first and last kept, as in MagCache's code.

    >>> stretched((1.0, 2.0, 3.0), 5)
    (1.0, 1.0, 2.0, 2.0, 3.0)
    """
    if length == 1:
        return (ratios[-1],)
    scale = (len(ratios) - 1) / (length - 1)
    return tuple(ratios[round(i * scale)] for i in range(length))
