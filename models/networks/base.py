"""What the rest asks of a denoising network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from models.rows import Conditioning, Row


class Network(Protocol):
    """The denoising network: serves rows with different plans in one forward."""

    module: nn.Module
    conditional_first: bool

    @property
    def depth(self) -> int:
        """U-Net: input blocks; transformer: its blocks."""

    def order(self, row: Row) -> tuple[Any, ...]:
        """The sort key of a row in the batch."""

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning, rows: Sequence[Row]) -> Tensor:
        """Predict for rows sorted by `order`: x [rows, channels, h, w], t [rows]; writes what the rows remember."""
