"""Distillation under the name that the library promises, with the world of the bundled models at hand."""

from functools import partial

from models.distill.training import distill as distill_on
from models.shapes.world import SHAPES

distill = partial(distill_on, world=SHAPES)

__all__ = ["distill"]
