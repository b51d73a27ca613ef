"""ControlNet (Zhang et al., 2023) row by row: a copy of a U-Net's input half sees a picture and steers by the skips.

It goes down level by level beside the U-Net, over the rows that have it and only as deep as each of them goes: what a
row recalls of deeper levels holds what their residuals did when it was computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from models.networks.levels import inputs_of, run_input, run_middle
from models.reuse.rows import Conditioning, Places, Row, RowControl, put


class ControlNet:
    """A diffusers `ControlNetModel` that serves rows. Read-only."""

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.module = module
        self.inputs = inputs_of(module)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(p.nbytes for p in self.module.parameters())

    @torch.inference_mode()
    def hint(self, pixels: Tensor) -> Tensor:
        """Pictures [n, 3, height, width], 0 to 1, as what is added to the first hidden states [n, channels, h, w]."""
        if self.module.config.controlnet_conditioning_channel_order == "bgr":
            pixels = torch.flip(pixels, dims=[1])
        embedded: Tensor = self.module.controlnet_cond_embedding(pixels)
        return embedded

    def embed(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Times t [rows], and what SDXL is told beside them, as [rows, dim] in the type of x."""
        net = self.module
        embedded: Tensor = net.time_embedding(net.time_proj(t).to(x.dtype))
        if net.config.addition_embed_type is None:
            return embedded
        text, ids = conditioning["text_embeds"], conditioning["time_ids"]
        times = net.add_time_proj(ids.flatten()).reshape(len(text), -1)
        further: Tensor = net.add_embedding(torch.cat([text, times], dim=-1).to(embedded.dtype))
        return embedded + further


@dataclass(frozen=True, slots=True)
class _Group:
    """The rows of one network: `rows` are positions in the batch, one for each time that a row has it."""

    network: ControlNet
    rows: Sequence[int]
    h: Tensor  # [entries, channels, h, w]
    emb: Tensor
    context: Tensor
    scale: float | Tensor  # one for all, or [entries, 1, 1, 1]

    def take(self, positions: dict[int, int], places: Places) -> _Group | None:
        """Those of its entries whose rows go on, `positions` saying where each then is."""
        entries = [i for i, row in enumerate(self.rows) if row in positions]
        if not entries:
            return None
        rows = [positions[self.rows[i]] for i in entries]
        if len(entries) == len(self.rows):
            return replace(self, rows=rows)
        scale = places.take(self.scale, entries) if isinstance(self.scale, Tensor) else self.scale
        h, emb, context = (places.take(x, entries) for x in (self.h, self.emb, self.context))
        return _Group(self.network, rows, h, emb, context, scale)


@dataclass(frozen=True, slots=True)
class Controls:
    """All control networks of one forward, each at the level that the U-Net is at, beside the rows that are there."""

    groups: tuple[_Group, ...]
    count: int  # rows of the batch
    places: Places

    def take(self, positions: Sequence[int]) -> Controls | None:
        """For these rows of the batch alone."""
        moved = {old: new for new, old in enumerate(positions)}
        groups = tuple(g for group in self.groups if (g := group.take(moved, self.places)) is not None)
        return Controls(groups, len(positions), self.places) if groups else None

    def down(self, number: int) -> Controls:
        """One level further: through input block `number`, of which the first was run at the beginning."""
        if number == 0:
            return self
        return replace(
            self,
            groups=tuple(replace(g, h=run_input(g.network.inputs[number], g.h, g.emb, g.context)) for g in self.groups),
        )

    def middle(self) -> Controls:
        """Through the middle."""
        return replace(
            self,
            groups=tuple(
                replace(g, h=run_middle(g.network.module.mid_block, g.h, g.emb, g.context)) for g in self.groups
            ),
        )

    def added(self, x: Tensor, number: int | None) -> Tensor:
        """x [rows, channels, h, w], the skip of level `number` or the middle (None), with what the networks add."""
        total: Tensor | None = None
        for group in self.groups:
            net = group.network.module
            out = net.controlnet_mid_block if number is None else net.controlnet_down_blocks[number]
            residual = out(group.h) * group.scale
            if list(group.rows) == list(range(self.count)):
                total = residual if total is None else total + residual
                continue
            total = torch.zeros_like(x) if total is None else total
            where = self.places.where(group.rows)
            if isinstance(where, slice):
                put(total, where, total[where] + residual)
            else:
                total = total.index_add(0, where, residual)
        return x if total is None else x + total


def begin(x: Tensor, t: Tensor, conditioning: Conditioning, rows: Sequence[Row], places: Places) -> Controls | None:
    """The control networks of these rows after their first input block; None where no row has one.

    x [rows, channels, height, width] are the latents as the U-Net is given them.
    """
    members: dict[ControlNet, list[tuple[int, RowControl]]] = {}
    for i, row in enumerate(rows):
        for control in row.controls:
            members.setdefault(control.network, []).append((i, control))
    if not members:
        return None
    groups = []
    for network, entries in members.items():
        where = [i for i, _ in entries]
        theirs = {name: places.take(given, where) for name, given in conditioning.items()}
        latents = places.take(x, where)
        hint = torch.cat([control.hint for _, control in entries])
        scales = [control.scale for _, control in entries]
        scale: float | Tensor = scales[0]
        if len(set(scales)) > 1:
            scale = places.numbers(scales).to(x.dtype).view(-1, 1, 1, 1)
        h = network.module.conv_in(latents) + hint
        embedded = network.embed(latents, places.take(t, where), theirs)
        groups.append(_Group(network, where, h, embedded, theirs["encoder_hidden_states"], scale))
    return Controls(tuple(groups), len(rows), places)
