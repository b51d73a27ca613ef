"""What a student is trained on: its squared error against the guided teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models.distill.data import Source
from models.distill.student import Pair
from models.fit.muon import MatrixMuon

LEAST_EFFECT = 1e-3  # of guidance on a prediction of about unit variance; below, errors are not magnified further


class DistillTask:
    """Squared error between the student's one row and the teacher's guided pair, the mean over images.

    With `relative` each image's error is divided by what guidance changes in it: else the first steps, where guidance
    changes most, count most. With `muon` the adapter's matrices take orthogonalised steps instead of AdamW's.
    """

    name = "student"

    def __init__(
        self, pair: Pair, source: Source, learning_rate: float, *, relative: bool = False, muon: bool = False
    ) -> None:
        self._pair, self._source, self._rate = pair, source, learning_rate
        self._relative, self._muon = relative, muon
        self.module = nn.Module()
        self.module.weights = nn.ParameterList(pair.parameters)
        self.module.source = source
        self._error: Tensor | None = None  # of the student, and of the bare conditional row; running means

    def optimizers(self) -> Sequence[Optimizer]:
        if self._muon:
            return [MatrixMuon(self._pair.parameters, self._rate, weight_decay=0.0)]
        return [torch.optim.AdamW(self._pair.parameters, lr=self._rate, betas=(0.9, 0.99), weight_decay=0.0)]

    def loss(self, generator: torch.Generator) -> Tensor:
        batch = self._source.batch(generator)
        target, conditional = self._pair.teacher(*batch)
        predicted = self._pair.student(batch.x, batch.t, batch.conditional)
        error = _squared(predicted, target)
        bare = _squared(conditional, target)
        self._source.advance(target, predicted.detach())
        now = torch.stack([error.detach().mean(), bare.mean()])
        self._error = now if self._error is None else self._error.lerp(now, 0.05)
        return (error / bare.clamp(min=LEAST_EFFECT) if self._relative else error).mean()

    def preview(self, folder: Path, step: int) -> str:
        if self._error is None:
            return "nothing left to do"
        student, plain = self._error.tolist()
        return f"squared error {student:.5f}, of the conditional row without adapter {plain:.5f}"


def _squared(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() - b.float()).square().mean(dim=(1, 2, 3))  # [rows]
