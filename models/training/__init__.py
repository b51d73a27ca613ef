"""Training: the bundled models and their world of shapes, and the distillation of guidance into a student."""

from models.training.distill import distill

__all__ = ["distill"]
