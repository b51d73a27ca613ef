"""No acceleration: every step in full."""

from typing import ClassVar, Literal

from models.accelerators.base import Accelerator


class NoAcceleration(Accelerator):
    """Run every step in full, exactly as the diffusers pipeline does."""

    mode: Literal["none"] = "none"
    title: ClassVar[str] = "Every step in full, exactly as the diffusers pipeline does."
