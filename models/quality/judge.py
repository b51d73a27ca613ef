"""Who reads pictures in an evaluation: a world that a model draws, given from outside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from PIL import Image
from torch import Tensor


class Judge(Protocol):
    """Knows what the captions of a world ask for, and what its pictures show."""

    def captions(self, count: int) -> list[str]:
        """Captions that no model of this world was trained on."""

    def reads(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> bool:
        """Whether these pictures and captions are of this world."""

    def alignment(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> dict[str, float]:
        """The share of pictures that keep each claim of their caption, and under `all` every claim."""

    def features(self, pictures: Sequence[Image.Image]) -> Tensor | None:
        """What matters in them, [pictures, dim], for a Fréchet distance; None: nothing is at hand to see it."""

    def true_pictures(self, captions: Sequence[str], count: int) -> list[Image.Image]:
        """At least `count` pictures that these captions are true of, the same number of each."""
