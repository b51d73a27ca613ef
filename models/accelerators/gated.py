"""What caches that decide while they run have in common: one rule, from which each makes its gate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from models.accelerators.base import Accelerator


class GatedCache(Accelerator):
    """A site is reused in the steps in which a row's own data has changed little; a guided pair decides together."""

    threshold: float = Field(gt=0.0, le=100.0, description="Reuse while the relative change is below this.")
    order: int = Field(0, ge=0, le=4, description="0 repeats what is remembered; k foretells it from k + 1 full steps.")
    warmup: int = Field(1, ge=1, le=1000, description="First steps that are always computed.")
    max_skips: int | None = Field(None, ge=1, le=1000, description="Most steps in a row that reuse; default no limit.")
    pair: Literal["mean", "max"] = Field(
        "mean", description="How a guided pair measures change: over both rows' elements, or the larger of the two."
    )
