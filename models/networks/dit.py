"""DiT and PixArt: what lies around the blocks of diffusers' two transformers of `BasicTransformerBlock`s."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor

from models.networks import dit_block
from models.networks.attention import AttentionRows
from models.networks.gated_blocks import BlockInputs
from models.networks.sites import TransformerSites
from models.networks.transformer import POSITION_BYTES, Transformer, unpatchify
from models.reuse.rows import Conditioning, Row

_BLOCK_INPUTS = ("timestep", "class_labels", "encoder_hidden_states", "encoder_attention_mask")


class DiT(Transformer):
    """A diffusers `DiTTransformer2DModel` or `PixArtTransformer2DModel`."""

    def __init__(self, module: Any) -> None:
        self.by_class = not hasattr(module, "adaln_single")  # conditioned on a class, in every block
        sites = TransformerSites(
            int(module.config.in_channels),
            len(module.transformer_blocks),
            int(module.config.patch_size),
            int(module.config.num_attention_heads * module.config.attention_head_dim),
            int(module.config.num_attention_heads),
            int(module.config.attention_head_dim),
            offers=frozenset({"modulated", "feed_forward", *(() if self.by_class else ("cross_attention",))}),
        )
        attentions = [block.attn1 for block in module.transformer_blocks]
        super().__init__(module, module.transformer_blocks, attentions, sites)
        self._positions: OrderedDict[tuple[int, int], Tensor] = OrderedDict()

    def begin(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, rows: Sequence[Row]
    ) -> tuple[Tensor, BlockInputs, Tensor]:
        """See `Transformer`."""
        h = self.embed(x)
        return (h, *self.conditions(h, t, conditioning))

    def end(self, h: Tensor, inputs: BlockInputs, embedded: Tensor, size: tuple[int, int]) -> Tensor:
        """See `Transformer`."""
        return unpatchify(self._head(h, inputs, embedded), size, self.module.config.patch_size)

    def block(self, number: int, h: Tensor, inputs: BlockInputs, attention: AttentionRows | None) -> Tensor:
        """See `Transformer`."""
        if attention is not None and attention.modules:
            return dit_block.run(self.blocks[number], number, h, inputs, attention)
        kwargs = None if attention is None else {"rows": attention}
        out: Tensor = self.blocks[number](h, attention_mask=None, cross_attention_kwargs=kwargs, **inputs.rows)
        return out

    def modulated(self, number: int, h: Tensor, inputs: BlockInputs) -> Tensor:
        """See `Transformer`."""
        return dit_block.begin(self.blocks[number], h, inputs).attended

    def embed(self, x: Tensor) -> Tensor:
        """Latents to tokens [rows, tokens, dim], with the position embedding of their size."""
        patches = self.module.pos_embed
        size = (x.shape[-2] // patches.patch_size, x.shape[-1] // patches.patch_size)
        h = patches.proj(x).flatten(2).transpose(1, 2)
        out: Tensor = (h + self._position(size, x.device)).to(h.dtype)
        return out

    def _position(self, size: tuple[int, int], device: torch.device) -> Tensor:
        """The position table of a size [1, tokens, dim]: the network's own for its native one, others made and kept."""
        patches = self.module.pos_embed
        if size == (patches.height, patches.width):
            native: Tensor = patches.pos_embed
            return native
        if size not in self._positions:
            table = get_2d_sincos_pos_embed(
                patches.pos_embed.shape[-1],
                size,
                base_size=patches.base_size,
                interpolation_scale=patches.interpolation_scale,
                device=device,
                output_type="pt",
            )
            self._positions[size] = table.float().unsqueeze(0)
        self._positions.move_to_end(size)
        while len(self._positions) > 1 and sum(t.nbytes for t in self._positions.values()) > POSITION_BYTES:
            self._positions.popitem(last=False)
        return self._positions[size]

    def conditions(self, h: Tensor, t: Tensor, given: Conditioning) -> tuple[BlockInputs, Tensor]:
        """What every block takes, and what the head takes, from times and conditioning."""
        if self.by_class:
            labels = given["class_labels"]
            embedded = self.blocks[0].norm1.emb(t, labels, hidden_dtype=h.dtype)  # type: ignore[operator, union-attr]
            return BlockInputs(dict(zip(_BLOCK_INPUTS, (t, labels, None, None), strict=True))), embedded
        added = {k: given.get(k) for k in ("resolution", "aspect_ratio")}
        timestep, embedded = self.module.adaln_single(t, added, batch_size=len(h), hidden_dtype=h.dtype)
        context = given["encoder_hidden_states"]
        if self.module.caption_projection is not None:
            context = self.module.caption_projection(context).view(len(h), -1, h.shape[-1])
        mask = given.get("encoder_attention_mask")
        if mask is not None:
            mask = ((1 - mask.to(h.dtype)) * -10000.0).unsqueeze(1)  # [rows, 1, text_tokens]
        return BlockInputs(dict(zip(_BLOCK_INPUTS, (timestep, None, context, mask), strict=True))), embedded

    def _head(self, h: Tensor, inputs: BlockInputs, embedded: Tensor) -> Tensor:
        dit = self.module
        if self.by_class:
            shift, scale = dit.proj_out_1(F.silu(embedded)).chunk(2, dim=1)
            return dit.proj_out_2(dit.norm_out(h) * (1 + scale[:, None]) + shift[:, None])  # type: ignore[no-any-return]
        shift, scale = (dit.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        return dit.proj_out(dit.norm_out(h) * (1 + scale) + shift)  # type: ignore[no-any-return]
