"""The U-Net as nested levels: level l runs its input block, everything deeper, then the output block that closes it.

A row whose plan exits at level b goes no deeper than b: its remembered hidden state (DeepCache) or zeros (depth-skip)
stand in for what lies inside. Rows are ordered by depth, deepest first, so that the rows that go on are always the head
of the batch: a slice, no gather and no index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from models.networks.attention import AttentionRows
from models.rows import Conditioning, Row, segments


@dataclass(frozen=True, slots=True)
class Level:
    """Input block l and the output block L-1-l that closes it."""

    down: nn.Module  # conv_in, a resnet, or a downsampler
    down_attention: nn.Module | None
    up: nn.Module  # a resnet over [inner, skip]
    up_attention: nn.Module | None
    upsampler: nn.Module | None
    inner_channels: int  # of the hidden state that enters the output block


@dataclass(frozen=True, slots=True)
class _Batch:
    """What travels down with the hidden states of `rows`."""

    rows: Sequence[Row]
    emb: Tensor  # [rows, time_dim]
    context: Tensor | None  # [rows, text_tokens, dim]
    mask: Tensor | None  # [rows, 1, text_tokens], additive
    adapters: AttentionRows | None
    resize: bool  # a size that does not halve evenly all the way down

    def head(self, n: int) -> _Batch:
        if n == len(self.rows):
            return self
        rows = self.rows[:n]
        context, mask = (t if t is None else t[:n] for t in (self.context, self.mask))
        adapters = None if self.adapters is None else AttentionRows(rows, segments(rows))
        return replace(self, rows=rows, emb=self.emb[:n], context=context, mask=mask, adapters=adapters)


class UNet:
    """Runs a diffusers `UNet2DConditionModel` (or an unconditional `UNet2DModel`) row by row as the plans say."""

    conditional_first = False  # diffusers' pipelines batch [unconditional, conditional]

    def __init__(self, module: Any) -> None:
        self.module = module
        self.levels = _levels(module)

    @property
    def depth(self) -> int:
        """Number of input blocks, L."""
        return len(self.levels)

    def order(self, row: Row) -> tuple[Any, ...]:
        """The sort key of a row in the batch: deepest first, then by adapter, unconditional before conditional."""
        depth = self.depth if row.plan.exit is None else row.plan.exit.level
        return (-depth, row.plan.adapter or "", row.role == "conditional")

    @torch.inference_mode()
    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning, rows: Sequence[Row]) -> Tensor:
        """Predict from latents x [rows, channels, height, width] at times t [rows], rows sorted by `order`."""
        unet = self.module
        depths = [self.order(row)[0] for row in rows]
        if depths != sorted(depths):
            raise ValueError("the rows are not in the order of `order`")
        factor = 2 ** sum(level.upsampler is not None for level in self.levels)
        if getattr(unet.config, "center_input_sample", False):
            x = 2 * x - 1.0
        batch = _Batch(
            rows,
            self._embed(x, t, conditioning),
            conditioning.get("encoder_hidden_states"),
            None,
            AttentionRows(rows, segments(rows)) if any(row.lora for row in rows) else None,
            any(side % factor for side in x.shape[-2:]),
        )
        h = self._descend(0, x, batch)
        out: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))
        return out

    def _descend(self, number: int, x: Tensor, batch: _Batch) -> Tensor:
        """Level `number` and everything inside it, for hidden states x of all rows that come this deep."""
        if number == self.depth:
            return self._middle(x, batch)
        level = self.levels[number]
        skip = self._attend(level.down_attention, self._down(level.down, x, batch.emb), batch)
        deeper = sum(row.plan.exit is None or row.plan.exit.level > number for row in batch.rows)
        parts: list[Tensor] = []
        if deeper:
            inner = self._descend(number + 1, skip[:deeper] if deeper < len(skip) else skip, batch.head(deeper))
            for i, row in enumerate(batch.rows[:deeper]):
                row.keep(("level", number), inner[i : i + 1])
            parts.append(inner)
        parts += [self._recall(level, number, row, skip) for row in batch.rows[deeper:]]
        h = parts[0] if len(parts) == 1 else torch.cat(parts)
        h = self._attend(level.up_attention, level.up(torch.cat([h, skip], dim=1), batch.emb), batch)
        if level.upsampler is not None:
            h = level.upsampler(h, x.shape[2:] if batch.resize else None)
        return h

    def _recall(self, level: Level, number: int, row: Row, skip: Tensor) -> Tensor:
        """What enters the output block of a row that goes no deeper, [1, inner_channels, height, width]."""
        if row.plan.exit is not None and row.plan.exit.remembered:
            return row.memory["level", number]
        return skip.new_zeros(1, level.inner_channels, *skip.shape[2:])

    def _middle(self, x: Tensor, batch: _Batch) -> Tensor:
        middle = self.module.mid_block
        if middle is None:  # loaded with the deeper modules left out
            return x.new_zeros(len(x), self.levels[-1].inner_channels, *x.shape[2:])
        h: Tensor = middle.resnets[0](x, batch.emb)
        for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
            h = resnet(self._attend(attention, h, batch), batch.emb)
        return h

    @staticmethod
    def _down(module: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        out: Tensor = module(x, emb) if hasattr(module, "time_emb_proj") else module(x)
        return out

    @staticmethod
    def _attend(attention: nn.Module | None, x: Tensor, batch: _Batch) -> Tensor:
        if attention is None:
            return x
        if isinstance(attention, Attention):  # an unconditional U-Net
            return cast(Tensor, attention(x))
        out: Tensor = attention(
            x,
            encoder_hidden_states=batch.context,
            cross_attention_kwargs=None if batch.adapters is None else {"rows": batch.adapters},
            encoder_attention_mask=batch.mask,
            return_dict=False,
        )[0]
        return out

    def _embed(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        unet: Any = self.module
        emb: Tensor = unet.time_embedding(unet.time_proj(t).to(x.dtype))
        if getattr(unet.config, "addition_embed_type", None) is not None:
            added = {k: conditioning[k] for k in ("text_embeds", "time_ids")}
            emb = emb + unet.get_aug_embed(
                emb=emb, encoder_hidden_states=conditioning["encoder_hidden_states"], added_cond_kwargs=added
            )
        return emb


def _levels(unet: Any) -> tuple[Level, ...]:
    """Pair the input blocks of a U-Net with the output blocks that close them."""
    downs: list[tuple[nn.Module, nn.Module | None]] = [(unet.conv_in, None)]
    for block in unet.down_blocks:
        downs += zip(block.resnets, _attentions(block), strict=True)
        downs += [(module, None) for module in getattr(block, "downsamplers", None) or ()]
    ups: list[tuple[nn.Module, nn.Module | None, nn.Module | None]] = []
    for block in unet.up_blocks:
        samplers = list(getattr(block, "upsamplers", None) or ())
        tails = [None] * (len(block.resnets) - 1) + [samplers[0] if samplers else None]
        ups += zip(block.resnets, _attentions(block), tails, strict=True)
    channels = [_out_channels(module) for module, _ in downs]
    return tuple(
        Level(*down, *up, inner_channels=up[0].in_channels - skip)  # type: ignore[arg-type, operator]
        for down, up, skip in zip(downs, reversed(ups), channels, strict=True)
    )


def _attentions(block: Any) -> list[nn.Module | None]:
    return list(getattr(block, "attentions", None) or [None] * len(block.resnets))


def _out_channels(module: Any) -> int:
    return int(module.out_channels)


def truncate(unet: Any, depth: int) -> dict[str, str]:
    """Drop the modules of a freshly built U-Net that `depth` input blocks never run (Kim et al., depth-skip).

    What stays is a prefix of the input blocks and the suffix of the output blocks that closes them; the middle goes.
    Returns the name that each weight that stays had before.
    """
    before = {id(tensor): name for name, tensor in unet.state_dict(keep_vars=True).items()}
    left = depth - 1  # conv_in is the first
    for block in unet.down_blocks:
        count = min(len(block.resnets), max(left, 0))
        _cut(block, slice(0, count))
        left -= count
        if getattr(block, "downsamplers", None) is not None:
            if left <= 0:
                block.downsamplers = None
            left -= 1
    left = depth
    for block in reversed(unet.up_blocks):
        count = min(len(block.resnets), max(left, 0))
        _cut(block, slice(len(block.resnets) - count, None))
        left -= count
        if count == 0:
            block.upsamplers = None
    unet.mid_block = None
    unet.down_blocks = nn.ModuleList(b for b in unet.down_blocks if len(b.resnets) or b.downsamplers is not None)
    unet.up_blocks = nn.ModuleList(b for b in unet.up_blocks if len(b.resnets))
    return {name: before[id(tensor)] for name, tensor in unet.state_dict(keep_vars=True).items()}


def _cut(block: Any, kept: slice) -> None:
    block.resnets = block.resnets[kept]
    if getattr(block, "attentions", None) is not None:
        block.attentions = block.attentions[kept]
