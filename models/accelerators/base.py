"""What an accelerator is: a frozen, validated value that answers each step with a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict

from models.errors import WrongBackbone
from models.reuse.plans import StepPlan
from models.reuse.sites import Site
from models.spec import Family, ModelSpec, RunSpec

if TYPE_CHECKING:
    from collections.abc import Sequence


class Accelerator(BaseModel):
    """Base of all accelerators. The value is the request parameter itself; its one job is `plan`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mode: str
    families: ClassVar[tuple[Family, ...]] = ("unet", "dit")
    claims: ClassVar[frozenset[str]] = frozenset()
    """The parts of a step that this accelerator decides; two that claim the same part refuse each other."""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    def bind(self, model: ModelSpec, run: RunSpec) -> Self:
        """This accelerator with its model-dependent defaults filled in.

        Raises a `RequestError` that names the field where the model or the run does not allow it.
        """
        return self

    def plan(self, step: int, num_steps: int) -> StepPlan:
        """What to reuse in evaluation `step` of `num_steps`, counted from the noisy end."""
        return StepPlan()

    def unguided(self) -> bool:
        """Whether the whole run has conditional rows only."""
        return False


def as_tuple(value: Any) -> Any:
    """JSON has lists where these frozen values have tuples, and requests are read strictly."""
    return tuple(value) if isinstance(value, list) else value


def check_site(accelerator: Accelerator, model: ModelSpec, site: Site, reuse: str) -> None:
    """Refuse a model whose network cannot do at a site what the accelerator asks. Raises `WrongBackbone`."""
    if reuse not in model.sites.understands(site):
        raise WrongBackbone(
            "acceleration.mode", f"{accelerator.mode} needs {site} {reuse}, which {model.name} does not offer"
        )


def needs_guidance(accelerators: Sequence[Accelerator]) -> bool:
    """Whether a run under these accelerators may have unconditional rows at all."""
    return not any(a.unguided() for a in accelerators)
