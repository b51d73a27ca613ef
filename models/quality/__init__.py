"""What an accelerator costs in quality: metrics, and evaluations of any set of accelerators on a model."""

from models.quality.evaluate import Evaluation, evaluate
from models.quality.judge import Judge

__all__ = ["Evaluation", "Judge", "evaluate"]
