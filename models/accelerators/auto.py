"""Auto: let the server choose, from what `calibrate` measured of the model (see `models.profiles.choice`)."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from models.accelerators.base import Accelerator
from models.errors import AcceleratorConflict
from models.spec import ModelSpec, RunSpec

Prefer = Literal["fidelity", "balanced", "speed"]


class Auto(Accelerator):
    """A wish in place of a mode: it becomes a scheduler, steps and accelerators before a run begins.

    One of `prefer`, `min_psnr`, `speedup` and `max_seconds`; without any, `prefer: balanced`.
    """

    mode: Literal["auto"] = "auto"
    prefer: Prefer | None = Field(
        None,
        description="The cheapest run that is at most 0 (fidelity), 2 (balanced, the default) or 5 dB (speed) farther "
        "from the converged picture than the plain run is.",
    )
    min_psnr: float | None = Field(
        None, ge=10, le=100, description="The cheapest run that is on average this like the plain one, in dB."
    )
    speedup: float | None = Field(
        None, ge=1, le=100, description="The best run of at least this many times fewer MACs than the plain one."
    )
    max_seconds: float | None = Field(
        None, gt=0, le=86_400, description="The best run predicted to be done in this time, the queue included."
    )
    flexible: bool = Field(
        False, description="Take a cheaper run where otherwise the deadline would probably be missed."
    )

    claims: ClassVar[frozenset[str]] = frozenset({"output"})
    title: ClassVar[str] = "Let the server choose scheduler, steps and accelerators from the model's measured profile."
    paper: ClassVar[str] = "https://arxiv.org/abs/2411.15381"

    @model_validator(mode="after")
    def _one_wish(self) -> Self:
        names = ("prefer", "min_psnr", "speedup", "max_seconds")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {', '.join(names)}, not {' and '.join(given)}")
        return self

    @property
    def preference(self) -> Prefer | None:
        """`prefer`, with its default; None where something else is wished for."""
        others = (self.min_psnr, self.speedup, self.max_seconds)
        return self.prefer or ("balanced" if all(other is None for other in others) else None)

    def bind(self, model: ModelSpec, run: RunSpec) -> Self:
        """Never: `models.resolve` puts what it chose in its place, and that is all that may stand there."""
        raise AcceleratorConflict("acceleration", "auto chooses all of the acceleration: it stands alone")
