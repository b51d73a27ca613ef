"""Classifier-free guidance (Ho & Salimans, 2022)."""

from torch import Tensor


def guided(conditional: Tensor, unconditional: Tensor | None, scale: float) -> Tensor:
    """Combine the predictions of a guided pair; without an unconditional one the conditional stands."""
    if unconditional is None:
        return conditional
    return unconditional + scale * (conditional - unconditional)
