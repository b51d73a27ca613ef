"""What the rest asks of a denoising network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from models.reuse.rows import Conditioning, Row
from models.reuse.sites import Sites
from models.reuse.store import FeatureStore


class Network(Protocol):
    """The denoising network: serves rows with different plans in one forward."""

    module: nn.Module

    @property
    def reusable(self) -> Sequence[nn.Module]:
        """The attentions that are sites."""

    @property
    def sites(self) -> Sites:
        """What the network declares of itself."""

    @property
    def depth(self) -> int:
        """U-Net: input blocks; transformer: its blocks."""

    def forward(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, rows: Sequence[Row], store: FeatureStore
    ) -> Tensor:
        """Predict for rows in the order given: x [rows, channels, h, w], t [rows]; the store takes what they keep."""
