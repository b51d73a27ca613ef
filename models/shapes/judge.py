"""The judge of evaluations in the world of shapes: the analytic checker, and the classifier's features."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import fields

from PIL import Image
from torch import Tensor

from models.shapes import classifier
from models.shapes.checker import Verdict, check
from models.shapes.shapes import SIDE, parse_caption, render
from models.shapes.validation import held_out_captions


class ShapesJudge:
    """See `models.quality.judge.Judge`."""

    def __init__(self) -> None:
        self._classifier = classifier.load() if classifier.FILE.is_file() else None

    def captions(self, count: int) -> list[str]:
        """See `Judge`: captions with the combinations that are held out of training."""
        return held_out_captions(count)

    def reads(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> bool:
        """See `Judge`."""
        try:
            for caption in captions:
                parse_caption(caption)
        except ValueError:
            return False
        return bool(pictures) and all(picture.size == (SIDE, SIDE) for picture in pictures)

    def alignment(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> dict[str, float]:
        """See `Judge`; the claims are those of a `Verdict`."""
        verdicts = [check(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
        names = [*(field.name for field in fields(Verdict)), "all"]
        return {name: sum(getattr(verdict, name) for verdict in verdicts) / len(verdicts) for name in names}

    def features(self, pictures: Sequence[Image.Image]) -> Tensor | None:
        """See `Judge`."""
        return None if self._classifier is None else classifier.features(self._classifier, pictures)

    def true_pictures(self, captions: Sequence[str], count: int) -> list[Image.Image]:
        """See `Judge`; always the same ones."""
        rng = random.Random(0)
        rounds = -(-count // len(captions))
        return [render(parse_caption(caption), rng) for _ in range(rounds) for caption in captions]
