"""Transformers over text and image tokens (Esser et al., 2024): joint blocks with weights for each, then single blocks.

The hidden state that travels is [text tokens, image tokens], so that ranges of blocks, gates and forecasts are those of
any transformer, over both streams at once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from models.networks import joint_block
from models.networks.attention import AttentionRows
from models.networks.gated_blocks import BlockInputs
from models.networks.joint_attention import Rope, Streams
from models.networks.joint_block import JointBegun
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
    """Joint blocks, then parallel ones over both streams as one. Subclasses say how each begins."""

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

    def modulated(self, number: int, h: Tensor, inputs: BlockInputs) -> Tensor:
        """See `Transformer`; of the image's tokens, as in TeaCache's own code."""
        if number >= self.joint_blocks:
            raise NotImplementedError("a gate on modulated inputs sits in front of the first block")
        return self.begun(self.blocks[number], self._streams(h, inputs), inputs).image.attended

    def block(self, number: int, h: Tensor, inputs: BlockInputs, attention: AttentionRows | None) -> Tensor:
        """See `Transformer`."""
        one, shared = self.blocks[number], inputs.shared
        if number >= self.joint_blocks:
            batch = attention and replace(attention, text=(0, shared.text))
            return self.single(one, number, h, inputs, batch)
        streams = self._streams(h, inputs)
        start = self.begun(one, streams, inputs)
        image, text = joint_block.run(one, number, streams, start, shared.rope, attention)
        return torch.cat([text, image], dim=1)

    def _streams(self, h: Tensor, inputs: BlockInputs) -> Streams:
        text = inputs.shared.text
        return h[:, text:], h[:, :text]

    @abstractmethod
    def begun(self, block: Any, streams: Streams, inputs: BlockInputs) -> JointBegun:
        """What a joint block makes of its streams and of time."""

    def single(self, block: Any, number: int, h: Tensor, inputs: BlockInputs, batch: AttentionRows | None) -> Tensor:
        """One parallel block over both streams h [rows, tokens, dim]."""
        raise NotImplementedError


def joint_sites(
    module: Any, channels: int, patch_size: int, modules: Sequence[Sequence[str]], **options: Any
) -> JointSites:
    """What a diffusers transformer of this kind declares; `modules` are those of each block."""
    config = module.config
    return JointSites(
        channels,
        len(modules),
        patch_size,
        module.inner_dim,
        int(config.num_attention_heads),
        int(config.attention_head_dim),
        frozenset({"modulated"}),
        modules=tuple(map(frozenset, modules)),
        **options,
    )


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
