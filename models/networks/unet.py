"""The U-Net as nested levels: level l runs its input block, everything deeper, then the output block that closes it.

A row that reuses level b goes no deeper than b: what it remembers (DeepCache) or zeros (depth-skip) stand in for what
lies inside. Rows are sorted by depth, deepest first, so that the rows that go on are always the head of the batch: a
slice, no gather and no index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from torch import Tensor, nn

from models.adapters.bound import bound
from models.networks import control
from models.networks.attention import AttentionRows
from models.networks.gating import Gates, gates_of
from models.networks.levels import levels_of
from models.networks.sites import UNetSites, level
from models.reuse.plans import Zeros
from models.reuse.rows import Conditioning, Places, Row, by_adapters, keep, segments
from models.reuse.sites import Feature
from models.reuse.store import FeatureStore


@dataclass(frozen=True, slots=True)
class _Batch:
    """What travels down with the hidden states of `rows`."""

    rows: Sequence[Row]
    depths: Sequence[int]  # the level beyond which each row reuses, the network's depth where it does not
    emb: Tensor  # [rows, time_dim]
    context: Tensor | None  # [rows, text_tokens, dim]
    adapters: AttentionRows | None
    resize: bool  # a size that does not halve evenly all the way down
    store: FeatureStore
    places: Places
    gates: Gates | None
    controls: control.Controls | None

    def take(self, positions: Sequence[int]) -> _Batch:
        if len(positions) == len(self.rows):
            return self
        rows = [self.rows[i] for i in positions]
        return replace(
            self,
            rows=rows,
            depths=[self.depths[i] for i in positions],
            emb=self.places.take(self.emb, positions),
            context=None if self.context is None else self.places.take(self.context, positions),
            adapters=None if self.adapters is None else AttentionRows(rows, segments(rows)),
            controls=None if self.controls is None else self.controls.take(positions),
        )


class UNet:
    """Runs a diffusers `UNet2DConditionModel` (or an unconditional `UNet2DModel`) row by row as the plans say, and the
    control networks of the rows that have any beside it."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.paths = {id(part): name for name, part in module.named_modules()}
        self.reusable: list[nn.Module] = []
        self.levels = levels_of(module)
        halvings = [0]
        for one in self.levels[1:]:
            halvings.append(halvings[-1] + isinstance(one.down, Downsample2D))
        self.sites = UNetSites(
            int(module.config.out_channels),
            tuple(one.inner_channels for one in self.levels),
            tuple(halvings),
            tuple(one.skip_channels for one in self.levels),
        )

    @property
    def depth(self) -> int:
        """Number of input blocks, L."""
        return len(self.levels)

    def _depth_of(self, row: Row) -> int:
        return min((site.start for site in row.plan.reads if site.kind == "level"), default=self.depth)

    def _zeros(self, row: Row, number: int) -> bool:
        return isinstance(row.plan.reads[level(number)].reuse, Zeros)

    @torch.inference_mode()
    def forward(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, rows: Sequence[Row], store: FeatureStore
    ) -> Tensor:
        """Predict from latents x [rows, channels, height, width] at times t [rows], in the order given."""
        places = Places(x)
        gates = gates_of(rows, store, places)
        depths = [self._depth_of(row) for row in rows]
        order = sorted(
            range(len(rows)),
            key=lambda i: (
                -depths[i],
                rows[i].plan.gating is not None,
                depths[i] < self.depth and self._zeros(rows[i], depths[i]),
                by_adapters(rows[i]),
            ),
        )
        x, t = places.take(x, order), places.take(t, order)
        conditioning = {name: places.take(value, order) for name, value in conditioning.items()}
        rows = [rows[i] for i in order]
        controls = control.begin(x, t, conditioning, rows, places)
        if "beside" in conditioning:  # further channels of what the network is given
            x = torch.cat([x, conditioning["beside"]], dim=1)
        unet = bound(self.module, "", rows)
        factor = 2 ** sum(one.upsampler is not None for one in self.levels)
        if getattr(unet.config, "center_input_sample", False):
            x = 2 * x - 1.0
        batch = _Batch(
            rows,
            [depths[i] for i in order],
            self._embed(unet, x, t, conditioning),
            conditioning.get("encoder_hidden_states"),
            AttentionRows(rows, segments(rows)) if any(row.adapters for row in rows) else None,
            any(side % factor for side in x.shape[-2:]),
            store,
            places,
            gates,
            controls,
        )
        h = self._descend(0, x, batch)
        out: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))
        return places.take(out, sorted(range(len(order)), key=order.__getitem__))

    def _descend(self, number: int, x: Tensor, batch: _Batch) -> Tensor:
        """Level `number` and everything inside it, for hidden states x of all rows that come this deep."""
        if number == self.depth:
            return self._middle(x, batch)
        this = self.levels[number]
        skip = self._attend(this.down_attention, self._down(this.down, x, batch), batch)
        if batch.controls is not None:
            batch = replace(batch, controls=batch.controls.down(number))
        if batch.gates is None:
            h = self._inside(number, skip, batch)
        else:
            h = self._gated_inside(number, skip, batch, batch.gates)
        if batch.controls is not None:
            skip = batch.controls.added(skip, number)
        h = self._attend(this.up_attention, self._of(this.up, batch)(torch.cat([h, skip], dim=1), batch.emb), batch)
        if this.upsampler is not None:
            h = self._of(this.upsampler, batch)(h, x.shape[2:] if batch.resize else None)
        return h

    def _inside(self, number: int, skip: Tensor, batch: _Batch) -> Tensor:
        """What enters a level's output block, from skip [rows, channels, h, w]; the head of the rows goes deeper."""
        deeper = sum(depth > number for depth in batch.depths)
        parts = [self._computed(number, skip, batch, range(deeper))] if deeper else []
        parts += self._recalled(number, batch.rows[deeper:], skip, batch.store)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _gated_inside(self, number: int, skip: Tensor, batch: _Batch, gates: Gates) -> Tensor:
        """The same where gates decide who goes deeper.

        Rows whose gate is here, while others have theirs deeper, wait until all are decided; then they follow apart.
        """
        rows = batch.rows
        if here := gates.at(rows, number):
            gates.offer([rows[i] for i in here], batch.places.take(skip, here))
        waiting = {i for i in here if gates.open(rows[i])}
        deeper = [i for i, row in enumerate(rows) if self._depth_of(row) > number and i not in waiting]
        parts = [self._computed(number, skip, batch, deeper)] if deeper else []
        members = [deeper] if deeper else []
        if late := [i for i in sorted(waiting) if self._depth_of(rows[i]) > number]:
            parts.append(self._computed(number, skip, batch, late))
            members.append(late)
        rest = set(range(len(rows))) - {i for gone in members for i in gone}
        members.append(sorted(rest, key=lambda i: (self._zeros(rows[i], number), i)))
        parts += self._recalled(number, [rows[i] for i in members[-1]], skip, batch.store)
        return batch.places.joined(parts, members)

    def _computed(self, number: int, skip: Tensor, batch: _Batch, positions: Sequence[int]) -> Tensor:
        """What the deeper levels give these rows, remembered for those that keep it."""
        going = batch.take(positions)
        inner = self._descend(number + 1, batch.places.take(skip, positions), going)
        keep(batch.store, batch.places, going.rows, Feature(level(number), "value"), inner)
        return inner

    def _recalled(self, number: int, rows: Sequence[Row], skip: Tensor, store: FeatureStore) -> list[Tensor]:
        """What enters the output block of rows that go no deeper: remembered, then zeros, [rows, channels, h, w]."""
        site = level(number)
        remembering = [(row.memory, row.plan.reads[site]) for row in rows if not self._zeros(row, number)]
        parts = [store.read(remembering)] if remembering else []
        if zeros := len(rows) - len(remembering):
            parts.append(skip.new_zeros(zeros, self.levels[number].inner_channels, *skip.shape[2:]))
        return parts

    def _middle(self, x: Tensor, batch: _Batch) -> Tensor:
        middle = self.module.mid_block
        if middle is None:  # loaded with the deeper modules left out
            return x.new_zeros(len(x), self.levels[-1].inner_channels, *x.shape[2:])
        h: Tensor = self._of(middle.resnets[0], batch)(x, batch.emb)
        for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
            h = self._of(resnet, batch)(self._attend(attention, h, batch), batch.emb)
        return h if batch.controls is None else batch.controls.middle().added(h, None)

    def _of(self, module: nn.Module, batch: _Batch) -> Any:
        """A module as the rows of this batch run it."""
        return module if batch.adapters is None else bound(module, self.paths[id(module)], batch.rows)

    def _down(self, module: nn.Module, x: Tensor, batch: _Batch) -> Tensor:
        seen = self._of(module, batch)
        out: Tensor = seen(x, batch.emb) if hasattr(seen, "time_emb_proj") else seen(x)
        return out

    def _attend(self, attention: nn.Module | None, x: Tensor, batch: _Batch) -> Tensor:
        if attention is None:
            return x
        attention = self._of(attention, batch)
        if isinstance(attention, Attention):  # an unconditional U-Net
            return cast(Tensor, attention(x))
        out: Tensor = attention(
            x,
            encoder_hidden_states=batch.context,
            cross_attention_kwargs=None if batch.adapters is None else {"rows": batch.adapters},
            return_dict=False,
        )[0]
        return out

    @staticmethod
    def _embed(unet: Any, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        emb: Tensor = unet.time_embedding(unet.time_proj(t).to(x.dtype))
        if getattr(unet.config, "addition_embed_type", None) is not None:
            added = {k: conditioning[k] for k in ("text_embeds", "time_ids")}
            emb = emb + unet.get_aug_embed(
                emb=emb, encoder_hidden_states=conditioning["encoder_hidden_states"], added_cond_kwargs=added
            )
        return emb


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
