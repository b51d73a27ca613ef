"""The accelerators by their mode name. Adding one is a file beside this and a line in `REGISTRY`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from models.accelerators.adaptive_deepcache import AdaptiveDeepCache
from models.accelerators.auto import Auto
from models.accelerators.base import Accelerator
from models.accelerators.cfg_student import CfgStudent
from models.accelerators.deepcache import DeepCache
from models.accelerators.delta_dit import DeltaDiT
from models.accelerators.depth_skip import DepthSkip
from models.accelerators.ditfastattn import DiTFastAttn
from models.accelerators.first_block_cache import FirstBlockCache
from models.accelerators.forecast import Forecast
from models.accelerators.magcache import MagCache
from models.accelerators.none import NoAcceleration
from models.accelerators.selective_guidance import SelectiveGuidance
from models.accelerators.taylorseer import TaylorSeer
from models.accelerators.teacache import TeaCache
from models.errors import AcceleratorConflict, RequestError, WrongBackbone, cut
from models.spec import ModelSpec, RunSpec

REGISTRY: dict[str, type[Accelerator]] = {
    "none": NoAcceleration,
    "auto": Auto,
    "deepcache": DeepCache,
    "delta_dit": DeltaDiT,
    "ditfastattn": DiTFastAttn,
    "cfg_student": CfgStudent,
    "depth_skip": DepthSkip,
    "selective_guidance": SelectiveGuidance,
    "forecast": Forecast,
    "taylorseer": TaylorSeer,
    "first_block_cache": FirstBlockCache,
    "teacache": TeaCache,
    "magcache": MagCache,
    "adaptive_deepcache": AdaptiveDeepCache,
}


def from_mode(mode: Mapping[str, Any]) -> Accelerator:
    """The accelerator of a mode object, as a profile or a file holds it. Raises a `RequestError` where it is none."""
    accelerator = REGISTRY.get(str(mode.get("mode")))
    if accelerator is None:
        raise RequestError("acceleration.mode", f"{cut(str(mode.get('mode')))!r} is not one of {', '.join(REGISTRY)}")
    try:
        return accelerator.model_validate(dict(mode))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(["acceleration", *(str(part) for part in first["loc"])])
        raise RequestError(field, f"{accelerator.__name__}: {first['msg']}") from None


def bind(accelerators: Sequence[Accelerator], model: ModelSpec, run: RunSpec) -> tuple[Accelerator, ...]:
    """Check that these accelerators fit the model, the run and each other, and fill in their defaults.

    Raises a `RequestError` of the kind that says what does not fit.
    """
    claimed: dict[str, str] = {}
    for accelerator in accelerators:
        if model.family not in accelerator.families:
            fits = " or ".join(accelerator.families)
            raise WrongBackbone(
                "acceleration.mode", f"{accelerator.mode} is for {fits} backbones, {model.name} is a {model.family}"
            )
        for claim in sorted(accelerator.claims):
            if other := claimed.get(claim):
                raise AcceleratorConflict(
                    "acceleration", f"{other} and {accelerator.mode} both decide the {claim} of a step"
                )
            claimed[claim] = accelerator.mode
    return tuple(a.bind(model, run) for a in accelerators if a.mode != "none")


__all__ = [
    "REGISTRY",
    "Accelerator",
    "AdaptiveDeepCache",
    "Auto",
    "CfgStudent",
    "DeepCache",
    "DeltaDiT",
    "DepthSkip",
    "DiTFastAttn",
    "FirstBlockCache",
    "Forecast",
    "MagCache",
    "NoAcceleration",
    "SelectiveGuidance",
    "TaylorSeer",
    "TeaCache",
    "bind",
    "from_mode",
]
