"""DeepCache: on most steps run only the outer levels of the U-Net (Ma et al., CVPR 2024, arXiv:2312.00858)."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import ClassVar, Literal, Self

from pydantic import Field

from models.accelerators.base import Accelerator
from models.errors import OutOfRange
from models.networks.sites import level
from models.reuse.plans import Recall, StepPlan
from models.spec import Family, ModelSpec, RunSpec


class DeepCache(Accelerator):
    """Full steps remember the hidden state that enters output block L-1-branch; the steps between start from it.

    `branch` counts from 0 (the paper's "skip branch k" is `branch = k - 1`). `uniform` takes a full step every
    `interval` evaluations; `nonuniform` takes as many, denser around evaluation `center` with power `power` (eq. 7).
    """

    mode: Literal["deepcache"] = "deepcache"
    interval: int = Field(3, ge=1, le=1000, description="One full step in this many.")
    branch: int = Field(0, ge=0, description="Shallow steps run input blocks 0..branch and their output blocks.")
    schedule: Literal["uniform", "nonuniform"] = "uniform"
    center: int = Field(15, ge=0, le=1000, description="nonuniform: the step around which full steps are dense.")
    power: float = Field(1.5, ge=1.0, le=10.0, description="nonuniform: how dense.")
    order: int = Field(0, ge=0, le=4, description="0 repeats what is remembered; k foretells it from k + 1 full steps.")

    families: ClassVar[tuple[Family, ...]] = ("unet",)
    claims: ClassVar[frozenset[str]] = frozenset({"exit"})
    title: ClassVar[str] = "Between full steps, run only the outer levels of the U-Net on remembered deep features."
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.00858"

    def bind(self, model: ModelSpec, run: RunSpec) -> Self:
        """Check the branch against the U-Net's depth."""
        if self.branch >= model.depth:
            raise OutOfRange("acceleration.branch", f"{self.branch} is not in 0..{model.depth - 1} of {model.name}")
        return self

    def plan(self, step: int, num_steps: int) -> StepPlan:
        """A full step, or an exit at `branch` with the remembered features."""
        if self.schedule == "uniform":
            full = step % self.interval == 0
        else:
            full = step in nonuniform_steps(num_steps, self.interval, self.center, self.power)
        return StepPlan() if full else StepPlan({level(self.branch): Recall(self.order)})


@lru_cache(maxsize=256)
def nonuniform_steps(num_steps: int, interval: int, center: int, power: float) -> frozenset[int]:
    """The full steps of the non-uniform 1:N schedule: ceil(T/N) points of a line spaced by `power` around `center`.

    The line starts at the `power`-th root of -center, which is complex; the real part of its points' powers counts and
    is cut towards zero, as in the paper's code. The power falls by 0.02 until ceil(T/N) points differ. Where even an
    even spacing cannot give as many (a centre at the edge of a short run), the steps found are taken; step 0 always is
    one.
    """
    count = math.ceil(num_steps / interval)
    while True:
        start, stop = complex(-center) ** (1 / power), complex(num_steps - center) ** (1 / power)
        points = [start + (stop - start) * i / count for i in range(1, count)]
        offsets = {int((point**power).real) for point in points}
        steps = {0} | {offset + center for offset in offsets if 0 <= offset + center < num_steps}
        if len(steps) == count or power <= 1.0:
            return frozenset(steps)
        power = max(1.0, round(power - 0.02, 6))
