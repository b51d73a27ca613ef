"""What differs from one kind of model to another, one file each. Adding one is a file beside this and a line below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.errors import ModelLoadError
from models.families.base import Family, Parts
from models.families.dit import DIT
from models.families.flux import FLUX
from models.families.flux2 import FLUX2_KLEIN
from models.families.instruct_pix2pix import INSTRUCT_PIX2PIX
from models.families.pixart import PIXART
from models.families.sd import SD
from models.families.sd3 import SD3
from models.families.sdxl import SDXL
from models.families.unconditional import UNCONDITIONAL
from models.families.z_image import Z_IMAGE

REGISTRY: dict[str, Family] = {
    pipeline: family
    for family in (
        INSTRUCT_PIX2PIX,
        SD,
        SDXL,
        DIT,
        PIXART,
        SD3,
        FLUX,
        FLUX2_KLEIN,
        Z_IMAGE,
    )
    for pipeline in family.pipelines
}
"""Families by diffusers' pipeline class."""


def of_pipeline(class_name: str) -> Family:
    """The family that loads a pipeline of this class. Raises `ModelLoadError`."""
    if class_name not in REGISTRY:
        raise ModelLoadError(f"{class_name} is not one of {', '.join(REGISTRY)}")
    return REGISTRY[class_name]


def of_network(config: Mapping[str, Any]) -> Family:
    """The family of a bare network, by its diffusers config. Raises `ModelLoadError` where none implements it."""
    name = str(config.get("_class_name"))
    families = dict.fromkeys([*REGISTRY.values(), UNCONDITIONAL])
    fitting = [family for family in families if family.network_class == name]
    if not fitting:
        known = dict.fromkeys(family.network_class for family in families)
        raise ModelLoadError(f"config: {name} is not one of {', '.join(known)}")
    reasons = [family.refused(config) for family in fitting]
    if None not in reasons:
        raise ModelLoadError(f"config: {reasons[0]} is not implemented for {name}")
    return fitting[reasons.index(None)]


__all__ = ["REGISTRY", "Family", "Parts", "of_network", "of_pipeline"]
