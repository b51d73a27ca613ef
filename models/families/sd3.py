"""Stable Diffusion 3 and 3.5 (Esser et al., 2024)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.families.base import Parts
from models.families.configs import ANY
from models.families.mmdit import JointFamily
from models.guidance import ClassifierFree
from models.networks.base import Network
from models.networks.gated_blocks import BlockInputs
from models.networks.joint_attention import ImageFirstAttention, Streams, install_joint
from models.networks.joint_block import Again, JointBegun, begun
from models.networks.mmdit import JointTransformer, Layout, joint_sites
from models.networks.transformer import unpatchify
from models.reuse.rows import Conditioning, Row
from models.solvers.flow import FlowTimes


class SD3Network(JointTransformer):
    """diffusers' `SD3Transformer2DModel`: joint blocks alone, of which the last leaves the text as it is. In 3.5-medium
    the image tokens of the first blocks attend to themselves once more."""

    def __init__(self, module: Any) -> None:
        config = module.config
        twice = ("attention", "image_attention", "feed_forward")
        modules = [
            twice if one.use_dual_attention else ("attention", "feed_forward") for one in module.transformer_blocks
        ]
        sites = joint_sites(module, int(config.in_channels), int(config.patch_size), modules)
        super().__init__(module, module.transformer_blocks, [], sites)

    def kind(self, block: int) -> Hashable:
        """See `Transformer`."""
        one: Any = self.blocks[block]
        return one.use_dual_attention, one.context_pre_only

    def begin(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, rows: Sequence[Row]
    ) -> tuple[Tensor, BlockInputs, Tensor]:
        """See `Transformer`."""
        image = self.module.pos_embed(x).contiguous()
        embedded: Tensor = self.module.time_text_embed(t, conditioning["pooled_projections"])
        text = self.module.context_embedder(conditioning["encoder_hidden_states"])
        return torch.cat([text, image], dim=1), BlockInputs({"temb": embedded}, Layout(text.shape[1])), embedded

    def begun(self, block: Any, streams: Streams, inputs: BlockInputs) -> JointBegun:
        """See `JointTransformer`."""
        (image, text), time = streams, inputs.rows["temb"]
        again = None
        parts = list(block.norm1(image, emb=time))
        if block.use_dual_attention:
            *parts, attended, gate = parts
            again = Again(attended, gate[:, None])
        if block.context_pre_only:
            return JointBegun(begun(parts), block.norm1_context(text, time), again)
        return JointBegun(begun(parts), begun(block.norm1_context(text, emb=time)), again)

    def end(self, h: Tensor, inputs: BlockInputs, embedded: Tensor, size: tuple[int, int]) -> Tensor:
        """See `Transformer`."""
        h = self.module.proj_out(self.module.norm_out(h[:, inputs.shared.text :], embedded))
        return unpatchify(h, size, self.module.config.patch_size)


class StableDiffusion3(JointFamily):
    """Two CLIP encoders and a T5 one: their tokens one after the other, and the pooled CLIP prompts."""

    name = "sd3"
    pipelines = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
    network_class = "SD3Transformer2DModel"
    optional = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    unused = {"image_encoder": None, "feature_extractor": None}  # noqa: RUF012
    implements = {  # noqa: RUF012
        "sample_size": ANY,
        "patch_size": ANY,
        "in_channels": ANY,  # held against the VAE's latents
        "out_channels": ANY,
        "num_layers": ANY,
        "attention_head_dim": ANY,
        "num_attention_heads": ANY,
        "joint_attention_dim": ANY,
        "caption_projection_dim": ANY,
        "pooled_projection_dim": ANY,
        "pos_embed_max_size": ANY,
        "dual_attention_layers": ANY,
        "qk_norm": (None, "rms_norm"),
    }
    guidance = ClassifierFree()
    default_guidance_scale = 7.0
    flow = FlowTimes(even=False)
    usual_text_tokens = 77 + 256
    inputs = JointFamily.inputs | {"pooled_prompt_embeds", "negative_pooled_prompt_embeds"}

    def network(self, module: Any) -> Network:
        """See `Family`."""

        # Without text tokens of its own, as the second attention of a block has none, an attention is over one stream.
        install_joint(module, lambda processor: ImageFirstAttention if processor == "JointAttnProcessor2_0" else None)
        return SD3Network(module)

    def text_tokens(self, pipeline: Any) -> int:
        """See `Family`; CLIP's and then T5's."""
        return int(pipeline.tokenizer_max_length) + 256

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family`; positions are learned up to a size."""
        patch = config["patch_size"]
        return {"patch_size": patch, "default_steps": 28, "max_latent_side": config["pos_embed_max_size"] * patch}

    def native_size(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """See `Family`."""
        return config["sample_size"], config["sample_size"]

    def encode_texts(self, parts: Parts, texts: list[str]) -> Conditioning:
        """See `TextFamily`."""
        embeds, _, pooled, _ = parts.pipeline.encode_prompt(
            texts,
            None,
            None,
            device=parts.device,
            do_classifier_free_guidance=False,
            max_sequence_length=parts.text_tokens - parts.pipeline.tokenizer_max_length,
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def dummy(self, config: Mapping[str, Any], rows: int, text_tokens: int) -> Conditioning:
        """See `Family`."""
        sizes = {
            "encoder_hidden_states": (text_tokens, self.text_dim(config)),
            "pooled_projections": (config["pooled_projection_dim"],),
        }
        return {name: torch.empty(rows, *size, device="meta") for name, size in sizes.items()}

    def forward(self, module: Any, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """See `Family`."""
        return module(x, timestep=t, **conditioning, return_dict=False)[0]  # type: ignore[no-any-return]


SD3 = StableDiffusion3()
