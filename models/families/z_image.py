"""Z-Image (Alibaba, 2025), base and Turbo."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.families.base import Parts
from models.families.configs import ANY
from models.families.mmdit import JointFamily
from models.guidance import FromConditional
from models.networks.attention import AttentionRows
from models.networks.base import Network
from models.networks.gated_blocks import BlockInputs
from models.networks.joint_attention import ComplexRotaryAttention, install_joint
from models.networks.sites import JointSites, feed_forward
from models.networks.stream_block import Layout, modulation, run_block
from models.networks.transformer import Transformer, unpatchify
from models.request import Run
from models.reuse.plans import Role
from models.reuse.rows import Conditioning, Row, segments

MULTIPLE = 32
"""Image and text tokens are padded to a multiple of this many, with learned tokens that are attended to."""
PATCH = "2-1"


class ZImageNetwork(Transformer):
    """diffusers' `ZImageTransformer2DModel`: image and text are refined apart, then one stream, the image first.

    Prompts differ in length, and with it the positions of the image: both are each row's own.
    """

    def __init__(self, module: Any) -> None:
        config = module.config
        sites = JointSites(
            int(config.in_channels),
            int(config.n_layers),
            2,
            int(config.dim),
            int(config.n_heads),
            int(config.dim // config.n_heads),
            frozenset({"modulated"}),
            multiple=MULTIPLE,
            image_first=True,
            modules=(frozenset({"attention", "feed_forward"}),) * config.n_layers,
        )
        super().__init__(module, module.layers, [block.attention for block in module.layers], sites)

    def begin(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, rows: Sequence[Row]
    ) -> tuple[Tensor, BlockInputs, Tensor]:
        """See `Transformer`."""
        module = self.module
        attention = AttentionRows(rows, segments(rows)) if any(row.adapters for row in rows) else None
        time: Tensor = module.t_embedder((1000 - t) / 1000 * module.t_scale).type_as(x)
        tokens = conditioning["caption_tokens"]
        padded = tokens + (-tokens) % MULTIPLE  # of each row, [rows]

        image, image_at = self._image(x, padded)
        for block in module.noise_refiner:
            image = run_block(block, image, None, image_at, time, attention)

        caption = module.cap_embedder(conditioning["caption"])
        places = torch.arange(caption.shape[1], device=x.device)
        caption = torch.where((places >= tokens[:, None])[..., None], module.cap_pad_token, caption)
        caption_at = self._rotations(F.pad((places + 1)[:, None], (0, 2)).expand(len(x), -1, -1))
        attended = places < padded[:, None] if "attended" in conditioning else None
        for block in module.context_refiner:
            caption = run_block(block, caption, attended, caption_at, time, attention)

        if attended is not None:
            attended = F.pad(attended, (image.shape[1], 0), value=True)
        positions = torch.cat([image_at, caption_at], dim=1)
        layout = Layout((x.shape[-2] // 2) * (x.shape[-1] // 2), image.shape[1], image.shape[1] + caption.shape[1])
        inputs = BlockInputs({"time": time, "positions": positions, "attended": attended}, layout)
        return torch.cat([image, caption], dim=1), inputs, time

    def _image(self, x: Tensor, caption: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded and padded image tokens [rows, tokens, dim] and their rotations; `caption` [rows] is the length of
        the caption in front of them."""
        rows, channels, height, width = x.shape
        height, width = height // 2, width // 2
        x = x.reshape(rows, channels, height, 2, width, 2).permute(0, 2, 4, 3, 5, 1)
        x = x.reshape(rows, height * width, 4 * channels)
        spare = -x.shape[1] % MULTIPLE
        ids = torch.zeros(rows, height, width, 3, dtype=torch.long, device=x.device)
        ids[..., 0] = (caption + 1)[:, None, None]
        ids[..., 1] = torch.arange(height, device=x.device)[:, None]
        ids[..., 2] = torch.arange(width, device=x.device)
        h = self.module.all_x_embedder[PATCH](x)
        if spare:
            h = torch.cat([h, self.module.x_pad_token.to(h.dtype).expand(rows, spare, -1)], dim=1)
        return h, self._rotations(F.pad(ids.flatten(1, 2), (0, 0, 0, spare)))

    def _rotations(self, ids: Tensor) -> Tensor:
        """Complex rotations [rows, tokens, head_dim / 2] at positions [rows, tokens, 3]."""
        found: Tensor = self.module.rope_embedder(ids.flatten(0, 1))
        return found.view(*ids.shape[:2], -1)

    def probed(self, h: Tensor, inputs: BlockInputs) -> Tensor:
        """See `Blocks`; the image's tokens, without padding."""
        return h[:, : inputs.shared.image]

    def modulated(self, number: int, h: Tensor, inputs: BlockInputs) -> Tensor:
        """See `Transformer`."""
        one: Any = self.blocks[number]
        scale, *_ = modulation(one, inputs.rows["time"])
        return one.attention_norm1(self.probed(h, inputs)) * (1.0 + scale)  # type: ignore[no-any-return]

    def block(self, number: int, h: Tensor, inputs: BlockInputs, attention: AttentionRows | None) -> Tensor:
        """See `Transformer`."""
        given, layout = inputs.rows, inputs.shared
        batch = attention and replace(attention, text=(layout.caption, layout.end))
        return run_block(
            self.blocks[number], h, given["attended"], given["positions"], given["time"], batch, feed_forward(number)
        )

    def end(self, h: Tensor, inputs: BlockInputs, embedded: Tensor, size: tuple[int, int]) -> Tensor:
        """See `Transformer`; the network predicts clean - noise."""
        out = self.module.all_final_layer[PATCH](h, c=embedded)
        return -unpatchify(out[:, : (size[0] // 2) * (size[1] // 2)], size, 2)


class ZImage(JointFamily):
    """A Qwen3 prompt of its own length before one stream of tokens."""

    name = "z-image"
    pipelines = ("ZImagePipeline", "ZImageImg2ImgPipeline")
    network_class = "ZImageTransformer2DModel"
    optional = ("text_encoder", "tokenizer")
    implements = {  # noqa: RUF012
        "all_patch_size": (2,),
        "all_f_patch_size": (1,),
        "in_channels": ANY,  # held against the VAE's latents
        "dim": ANY,
        "n_layers": ANY,
        "n_refiner_layers": ANY,
        "n_heads": ANY,
        "n_kv_heads": ANY,  # of no effect in diffusers either
        "norm_eps": ANY,
        "qk_norm": (True, False),
        "cap_feat_dim": ANY,
        "siglip_feat_dim": (None,),  # pictures as prompts
        "rope_theta": ANY,
        "t_scale": ANY,
        "axes_dims": ANY,
        "axes_lens": ANY,
    }
    guidance = FromConditional()
    default_guidance_scale = 5.0
    usual_text_tokens = 512

    def network(self, module: Any) -> Network:
        """See `Family`."""
        found = {"ZSingleStreamAttnProcessor": ComplexRotaryAttention}
        install_joint(module, lambda processor: found.get(processor))
        return ZImageNetwork(module)

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family`; there are positions up to a size."""
        return {"patch_size": 2, "default_steps": 50, "max_latent_side": 2 * min(config["axes_lens"][1:])}

    def text_dim(self, config: Mapping[str, object]) -> int:
        """See `TextFamily`."""
        return int(config["cap_feat_dim"])  # type: ignore[call-overload, no-any-return]

    def encode_texts(self, parts: Parts, texts: list[str]) -> Conditioning:
        """See `TextFamily`; shorter prompts are padded, and each says how long it is, on the host."""
        found, _ = parts.pipeline.encode_prompt(
            list(texts), device=parts.device, do_classifier_free_guidance=False, max_sequence_length=parts.text_tokens
        )
        caption = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
        return {"caption": caption, "caption_tokens": torch.tensor([len(one) for one in found])}

    def given(self, parts: Parts, embeds: Tensor, mask: Tensor | None, pooled: Tensor | None) -> Conditioning:
        """See `TextFamily`."""
        [caption] = super().given(parts, embeds, mask, pooled).values()
        return {"caption": caption, "caption_tokens": torch.tensor([caption.shape[1]])}

    def prompt_tokens(self, parts: Parts, run: Run) -> int:
        """See `Family`; of the longer of the two prompts."""
        return max(self._lengths(parts, run))

    def group(self, parts: Parts, run: Run) -> Hashable:
        """See `Family`; the length of the longest prompt, and whether the other's is another."""
        padded = self._lengths(parts, run)
        return max(padded), len(padded) > 1

    def _lengths(self, parts: Parts, run: Run) -> set[int]:
        """Tokens of the prompts of a run, with their padding."""
        request, lengths = run.request, [_length(parts, text) for text in self.prompts(parts, run)]
        given = (request.prompt_embeds, request.negative_prompt_embeds if run.guided else None)
        lengths += [embeds.shape[1] for embeds in given if embeds is not None]
        return {length + -length % MULTIPLE for length in lengths}

    def aligned(self, parts: Parts, rows: dict[Role, Conditioning]) -> dict[Role, Conditioning]:
        """See `TextFamily`; the rows of a run are of one length, that of its longest prompt. Where that is not the
        other's, some tokens are not attended to: those runs are of a group of their own, alone or together."""
        lengths = {role: int(row["caption_tokens"]) for role, row in rows.items()}
        padded = {length + -length % MULTIPLE for length in lengths.values()}
        found = {}
        for role, row in rows.items():
            caption = row["caption"][:, : lengths[role]]
            caption = F.pad(caption, (0, 0, 0, max(padded) - lengths[role]))
            found[role] = {"caption": caption, "caption_tokens": row["caption_tokens"].to(parts.device)}
            if len(padded) > 1:
                found[role]["attended"] = torch.ones(1, dtype=torch.bool, device=parts.device)
        return found

    def dummy(self, config: Mapping[str, Any], rows: int, text_tokens: int) -> Conditioning:
        """See `Family`; prompts are counted with their padding."""
        text_tokens += -text_tokens % MULTIPLE
        return {
            "caption": torch.empty(rows, text_tokens, self.text_dim(config), device="meta"),
            "caption_tokens": torch.empty(rows, dtype=torch.long, device="meta"),
        }


def _length(parts: Parts, text: str) -> int:
    """Tokens of a prompt."""
    message = [{"role": "user", "content": text}]
    with parts.spare.of(parts.pipeline.tokenizer) as tokenizer:
        said = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        return min(len(tokenizer(said).input_ids), parts.text_tokens)


Z_IMAGE = ZImage()
