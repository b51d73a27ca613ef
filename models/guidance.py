"""Classifier-free guidance (Ho & Salimans, 2022)."""

from torch import Tensor

from models.reuse.plans import Role


def guided(conditional: Tensor, unconditional: Tensor | None, scale: float) -> Tensor:
    """Combine the predictions of a guided pair; without an unconditional one the conditional stands."""
    if unconditional is None:
        return conditional
    return unconditional + scale * (conditional - unconditional)


def guidance_weights(scale: float) -> dict[Role, float]:
    """The same combination as weights of the two predictions."""
    return {"conditional": scale, "unconditional": 1.0 - scale}
