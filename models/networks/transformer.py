"""The diffusion transformer as a list of blocks: the loop is ours, the block maths is diffusers'.

A row whose plan caches a range of blocks waits while the others run them, and adds its remembered effect (Δ-DiT). Rows
that cache the rear stand at the front of the batch, rows that cache the front at its end, so the rows that run a block
are always one slice. What each row does in a self-attention (DiTFastAttn) is sorted into groups once a forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn

from models.networks.attention import AttentionRows
from models.networks.groups import AttentionGroups
from models.rows import Conditioning, Row

BlockInputs = dict[str, Tensor | None]
_BLOCK_INPUTS = ("timestep", "class_labels", "encoder_hidden_states", "encoder_attention_mask")


class DiT:
    """Runs a diffusers `DiTTransformer2DModel` or `PixArtTransformer2DModel` row by row as the plans say."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.blocks: list[nn.Module] = list(module.transformer_blocks)
        self.conditional_first = not hasattr(module, "adaln_single")  # DiTPipeline batches [conditional, unconditional]
        self._positions: dict[tuple[int, int], Tensor] = {}

    @property
    def depth(self) -> int:
        """Number of transformer blocks."""
        return len(self.blocks)

    def order(self, row: Row) -> tuple[Any, ...]:
        """The sort key of a row in the batch: rear-cachers (widest first), full rows, front-cachers (widest last)."""
        zone = (0, 0)
        if row.plan.cached is not None:
            start, stop = row.plan.cached
            zone = (-1, start) if start > 0 else (1, stop)
        return (*zone, row.plan.adapter or "", (row.role == "conditional") != self.conditional_first)

    @torch.inference_mode()
    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning, rows: Sequence[Row]) -> Tensor:
        """Predict from latents x [rows, channels, height, width] at times t [rows], rows sorted by `order`."""
        height, width = (side // self.module.config.patch_size for side in x.shape[-2:])
        h = self.embed(x)  # [rows, tokens, dim]
        inputs, embedded = self.conditions(h, t, conditioning)
        h = self._run_blocks(h, inputs, rows)
        return self._unpatchify(self._head(h, inputs, embedded), height, width)

    def _run_blocks(self, h: Tensor, inputs: BlockInputs, rows: Sequence[Row]) -> Tensor:
        groups = AttentionGroups(rows, h.device)
        for start, stop in self._runs(rows):
            active = [i for i, row in enumerate(rows) if row.plan.runs(start)]
            lo, hi = (active[0], active[-1] + 1) if active else (0, 0)
            if hi - lo != len(active):
                raise ValueError("the rows are not in the order of `order`")
            before = h
            if active:
                part = h if hi - lo == len(rows) else h[lo:hi]
                sliced = {k: v if v is None or hi - lo == len(rows) else v[lo:hi] for k, v in inputs.items()}
                for block in range(start, stop):
                    part = self.block(block, part, sliced, groups.at(block, lo, hi))
                h = part
            if hi - lo < len(rows):
                waiting = [self._wait(before[i : i + 1], row, start) for i, row in enumerate(rows)]
                h = torch.cat([*waiting[:lo], *([h] if active else []), *waiting[hi:]])
            self._remember(rows, before, h, start, stop)
        return h

    def _runs(self, rows: Sequence[Row]) -> list[tuple[int, int]]:
        """Stretches of blocks within which no row joins, leaves, or begins or ends a range to remember."""
        ranges = {row.plan.cached for row in rows if row.plan.cached is not None}
        ranges |= {key[1:] for row in rows for key in row.plan.keep if key[0] == "range"}  # type: ignore[misc]
        cuts = sorted({0, self.depth, *(edge for pair in ranges for edge in pair)})
        return list(pairwise(cuts))

    @staticmethod
    def _wait(h: Tensor, row: Row, block: int) -> Tensor:
        """A row that does not run: unchanged, but for the remembered effect where its range begins."""
        if row.plan.cached is not None and row.plan.cached[0] == block:
            return h + row.memory["range", *row.plan.cached]
        return h

    @staticmethod
    def _remember(rows: Sequence[Row], before: Tensor, after: Tensor, start: int, stop: int) -> None:
        """Keep the effect of a range of blocks: begun as minus its input, ended by adding its output."""
        for i, row in enumerate(rows):
            for key in row.plan.keep:
                if key[0] == "range" and key[1] == start:
                    row.memory[key] = -before[i : i + 1]
                if key[0] == "range" and key[2] == stop:  # type: ignore[misc]
                    row.memory[key] = after[i : i + 1] + row.memory[key]

    def block(self, number: int, h: Tensor, inputs: BlockInputs, attention: AttentionRows | None) -> Tensor:
        """One transformer block over hidden states h [rows, tokens, dim]."""
        kwargs = None if attention is None else {"rows": attention}
        out: Tensor = self.blocks[number](h, attention_mask=None, cross_attention_kwargs=kwargs, **inputs)
        return out

    def embed(self, x: Tensor) -> Tensor:
        """Latents to tokens [rows, tokens, dim], with the position embedding of their size (made once a size)."""
        patches = self.module.pos_embed
        size = (x.shape[-2] // patches.patch_size, x.shape[-1] // patches.patch_size)
        if size not in self._positions:
            self._positions[size] = self._position(size, x.device)
        h = patches.proj(x).flatten(2).transpose(1, 2)
        out: Tensor = (h + self._positions[size]).to(h.dtype)
        return out

    def _position(self, size: tuple[int, int], device: torch.device) -> Tensor:
        patches = self.module.pos_embed
        if size == (patches.height, patches.width):
            native: Tensor = patches.pos_embed
            return native
        table = get_2d_sincos_pos_embed(
            patches.pos_embed.shape[-1],
            size,
            base_size=patches.base_size,
            interpolation_scale=patches.interpolation_scale,
            device=device,
            output_type="pt",
        )
        return table.float().unsqueeze(0)  # type: ignore[no-any-return]

    def conditions(self, h: Tensor, t: Tensor, given: Conditioning) -> tuple[BlockInputs, Tensor]:
        """What every block takes, and what the head takes, from times and conditioning."""
        if self.conditional_first:
            labels = given["class_labels"]
            embedded = self.blocks[0].norm1.emb(t, labels, hidden_dtype=h.dtype)  # type: ignore[operator, union-attr]
            return dict(zip(_BLOCK_INPUTS, (t, labels, None, None), strict=True)), embedded
        added = {k: given.get(k) for k in ("resolution", "aspect_ratio")}
        timestep, embedded = self.module.adaln_single(t, added, batch_size=len(h), hidden_dtype=h.dtype)
        context = given["encoder_hidden_states"]
        if self.module.caption_projection is not None:
            context = self.module.caption_projection(context).view(len(h), -1, h.shape[-1])
        mask = given.get("encoder_attention_mask")
        if mask is not None:
            mask = ((1 - mask.to(h.dtype)) * -10000.0).unsqueeze(1)  # [rows, 1, text_tokens]
        return dict(zip(_BLOCK_INPUTS, (timestep, None, context, mask), strict=True)), embedded

    def _head(self, h: Tensor, inputs: BlockInputs, embedded: Tensor) -> Tensor:
        dit = self.module
        if self.conditional_first:
            shift, scale = dit.proj_out_1(F.silu(embedded)).chunk(2, dim=1)
            return dit.proj_out_2(dit.norm_out(h) * (1 + scale[:, None]) + shift[:, None])  # type: ignore[no-any-return]
        shift, scale = (dit.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        return dit.proj_out(dit.norm_out(h) * (1 + scale) + shift)  # type: ignore[no-any-return]

    def _unpatchify(self, h: Tensor, height: int, width: int) -> Tensor:
        patch, channels = self.module.config.patch_size, self.module.out_channels
        h = h.reshape(-1, height, width, patch, patch, channels)
        h = torch.einsum("nhwpqc->nchpwq", h)
        return h.reshape(-1, channels, height * patch, width * patch)
