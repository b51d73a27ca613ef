"""Transformers over text and image tokens (Esser et al., 2024): joint blocks with weights for each, then single blocks.

The hidden state that travels is [text tokens, image tokens], so that ranges of blocks, gates and forecasts are those of
any transformer, over both streams at once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.networks.attention import AttentionRows
from models.networks.gated_blocks import BlockInputs
from models.networks.joint_attention import Rope, Streams
from models.networks.sites import JointSites
from models.networks.transformer import POSITION_BYTES, Transformer

Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """What all rows of a forward share: how many text tokens come first, and the rotary positions of all."""

    text: int
    rope: Rope | None = None


class Positions:
    """Rotary tables by size, kept up to `POSITION_BYTES`, least recently used first to go."""

    def __init__(self) -> None:
        self._tables: OrderedDict[Key, Rope] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Rope]) -> Rope:
        """The table of a key, made where it is not kept."""
        if key not in self._tables:
            self._tables[key] = make()
        self._tables.move_to_end(key)
        while len(self._tables) > 1 and sum(t.nbytes for pair in self._tables.values() for t in pair) > POSITION_BYTES:
            self._tables.popitem(last=False)
        return self._tables[key]


class JointTransformer(Transformer):
    """Joint blocks, then single ones. Subclasses say how each is called."""

    def __init__(self, module: Any, joint: Sequence[nn.Module], single: Sequence[nn.Module], sites: JointSites) -> None:
        blocks = [*joint, *single]
        super().__init__(module, blocks, [block.attn for block in blocks], sites)  # type: ignore[misc]
        self.joint_blocks = len(joint)
        self.positions = Positions()

    def probed(self, h: Tensor, inputs: BlockInputs) -> Tensor:
        """See `Blocks`; the image's tokens, as in diffusers' hooks."""
        return h[:, inputs.shared.text :]

    def kind(self, block: int) -> Hashable:
        """See `Transformer`."""
        return block < self.joint_blocks

    def block(self, number: int, h: Tensor, inputs: BlockInputs, attention: AttentionRows | None) -> Tensor:
        """See `Transformer`."""
        options: dict[str, Any] = {} if attention is None else {"rows": attention}
        if number >= self.joint_blocks:
            return self.single(self.blocks[number], h, inputs, options)
        text = inputs.shared.text
        image_out, text_out = self.joint(self.blocks[number], h[:, text:], h[:, :text], inputs, options)
        return torch.cat([text_out, image_out], dim=1)

    @abstractmethod
    def joint(self, block: Any, image: Tensor, text: Tensor, inputs: BlockInputs, options: dict[str, Any]) -> Streams:
        """One joint block; `options` are for its attention."""

    def single(self, block: Any, h: Tensor, inputs: BlockInputs, options: dict[str, Any]) -> Tensor:
        """One single block over both streams."""
        raise NotImplementedError


def pack(x: Tensor, patch: int = 2) -> Tensor:
    """Latents [rows, channels, height, width] to tokens [rows, tokens, channels * patch²], channel by channel."""
    rows, channels, height, width = x.shape
    x = x.reshape(rows, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(rows, -1, channels * patch * patch)


def unpack(h: Tensor, size: tuple[int, int], patch: int = 2) -> Tensor:
    """The other way round: tokens to latents of this height and width."""
    height, width = size
    h = h.reshape(len(h), height // patch, width // patch, -1, patch, patch)
    return h.permute(0, 3, 1, 4, 2, 5).reshape(len(h), -1, height, width)
