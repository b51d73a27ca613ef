"""Distillation under the name that the library promises."""

from models.distill.training import distill

__all__ = ["distill"]
