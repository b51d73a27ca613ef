"""Guidance: which rows a guided step has, and how their predictions become one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from models.reuse.plans import Role

CONDITIONAL: Role = "conditional"
"""The row that every step has; alone it is a step without guidance."""


@dataclass(frozen=True, slots=True)
class Scales:
    """How strongly a request is guided: by what it asks for and, where a family edits a picture, by that picture."""

    guidance: float = 1.0
    image: float = 1.0


class Guidance(Protocol):
    """The guidance of a family. `roles` are the rows of a guided step in the order in which diffusers batches them."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """One role: the family has no guidance of this kind."""

    @property
    def above(self) -> float:
        """The scale up to which there is no guidance."""

    def weights(self, scales: Scales) -> dict[Role, float]:
        """What each role's prediction counts in a guided step; all of them add up to one."""

    def combine(self, predictions: Mapping[Role, Tensor], scales: Scales) -> Tensor:
        """The same in diffusers' own order of operations, for bitwise equality; a conditional one alone stands."""


@dataclass(frozen=True, slots=True)
class ClassifierFree:
    """Classifier-free guidance (Ho & Salimans, 2022) of two rows."""

    roles: tuple[Role, ...] = ("unconditional", CONDITIONAL)
    above: float = 1.0

    def weights(self, scales: Scales) -> dict[Role, float]:
        """See `Guidance`."""
        return {"unconditional": 1.0 - scales.guidance, CONDITIONAL: scales.guidance}

    def combine(self, predictions: Mapping[Role, Tensor], scales: Scales) -> Tensor:
        """See `Guidance`."""
        return guided(predictions[CONDITIONAL], predictions.get("unconditional"), scales.guidance)


@dataclass(frozen=True, slots=True)
class Unguided:
    """One row a step: the network has no guidance, or takes its scale as an input."""

    roles: tuple[Role, ...] = (CONDITIONAL,)
    above: float = 1.0

    def weights(self, scales: Scales) -> dict[Role, float]:
        """See `Guidance`."""
        return {CONDITIONAL: 1.0}

    def combine(self, predictions: Mapping[Role, Tensor], scales: Scales) -> Tensor:
        """See `Guidance`."""
        return predictions[CONDITIONAL]


def guided(conditional: Tensor, unconditional: Tensor | None, scale: float) -> Tensor:
    """Combine the predictions of a guided pair; without an unconditional one the conditional stands."""
    if unconditional is None:
        return conditional
    return unconditional + scale * (conditional - unconditional)


@dataclass(frozen=True, slots=True)
class FromConditional:
    """Guidance away from the unconditional prediction, beginning at the conditional one: a scale of 0 is none."""

    roles: tuple[Role, ...] = (CONDITIONAL, "unconditional")
    above: float = 0.0

    def weights(self, scales: Scales) -> dict[Role, float]:
        """See `Guidance`."""
        return {CONDITIONAL: 1.0 + scales.guidance, "unconditional": -scales.guidance}

    def combine(self, predictions: Mapping[Role, Tensor], scales: Scales) -> Tensor:
        """See `Guidance`."""
        conditional, unconditional = predictions[CONDITIONAL], predictions.get("unconditional")
        return conditional if unconditional is None else conditional + scales.guidance * (conditional - unconditional)
