"""Flux.2 klein, base and distilled (Black Forest Labs, 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2Modulation
from torch import Tensor

from models.families import vae
from models.families.base import Parts
from models.families.configs import ANY
from models.families.mmdit import JointFamily
from models.guidance import ClassifierFree
from models.networks.attention import AttentionRows
from models.networks.base import Network
from models.networks.dit_block import Begun
from models.networks.gated_blocks import BlockInputs
from models.networks.joint_attention import FusedAttention, JointAttention, Rope, Streams, install_joint
from models.networks.joint_block import JointBegun, bounded
from models.networks.mmdit import JointTransformer, Layout, joint_sites
from models.reuse.rows import Conditioning, Row
from models.solvers.flow import FlowTimes


class Flux2Network(JointTransformer):
    """diffusers' `Flux2Transformer2DModel`: all blocks of a kind are modulated alike, single ones attend beside their
    MLP."""

    def __init__(self, module: Any) -> None:
        config = module.config
        modules = [("attention", "feed_forward")] * config.num_layers + [("attention",)] * config.num_single_layers
        sites = joint_sites(module, int(config.in_channels), 1, modules)
        super().__init__(module, module.transformer_blocks, module.single_transformer_blocks, sites)

    def begin(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, rows: Sequence[Row]
    ) -> tuple[Tensor, BlockInputs, Tensor]:
        """See `Transformer`."""
        module = self.module
        embedded: Tensor = module.time_guidance_embed((t.to(x.dtype) / 1000) * 1000, None)
        modulations = {
            "image": module.double_stream_modulation_img(embedded),
            "text": module.double_stream_modulation_txt(embedded),
            "single": module.single_stream_modulation(embedded),
        }
        image = module.x_embedder(x.flatten(2).transpose(1, 2))
        text = module.context_embedder(conditioning["encoder_hidden_states"])
        rope = self._rope(text.shape[1], x.shape[-2], x.shape[-1], x.device)
        return torch.cat([text, image], dim=1), BlockInputs(modulations, Layout(text.shape[1], rope)), embedded

    def _rope(self, text: int, height: int, width: int, device: torch.device) -> Rope:
        def make() -> Rope:
            zero = torch.arange(1)
            words = torch.cartesian_prod(zero, zero, zero, torch.arange(text))
            pixels = torch.cartesian_prod(zero, torch.arange(height), torch.arange(width), zero)
            tables = [self.module.pos_embed(ids.to(device)) for ids in (words, pixels)]
            cos, sin = (torch.cat(pair) for pair in zip(*tables, strict=True))
            return cos, sin

        return self.positions.get((text, height, width, device), make)

    def begun(self, block: Any, streams: Streams, inputs: BlockInputs) -> JointBegun:
        """See `JointTransformer`."""
        (image, text), given = streams, inputs.rows
        return JointBegun(_begun(block.norm1, image, given["image"]), _begun(block.norm1_context, text, given["text"]))

    def single(self, block: Any, number: int, h: Tensor, inputs: BlockInputs, batch: AttentionRows | None) -> Tensor:
        """See `JointTransformer`; attention and MLP are one module."""
        [(shift, scale, gate)] = Flux2Modulation.split(inputs.rows["single"], 1)
        attended = (1 + scale) * block.norm(h) + shift
        return bounded(h + gate * block.attn(attended, image_rotary_emb=inputs.shared.rope, rows=batch))

    def end(self, h: Tensor, inputs: BlockInputs, embedded: Tensor, size: tuple[int, int]) -> Tensor:
        """See `Transformer`."""
        h = self.module.proj_out(self.module.norm_out(h[:, inputs.shared.text :], embedded))
        return h.transpose(1, 2).reshape(len(h), -1, *size)


def _begun(norm: Any, h: Tensor, modulation: Tensor | None) -> Begun:
    (shift, scale, gate), (shift_mlp, scale_mlp, gate_mlp) = Flux2Modulation.split(modulation, 2)
    return Begun((1 + scale) * norm(h) + shift, gate, shift_mlp, scale_mlp, gate_mlp)


class Flux2Klein(JointFamily):
    """A Qwen3 prompt from three of its layers. Latents are the VAE's, four pixels as one, whitened; pictures to edit,
    which its pipeline takes as more tokens, are not implemented."""

    name = "flux2-klein"
    pipelines = ("Flux2KleinPipeline",)
    network_class = "Flux2Transformer2DModel"
    optional = ("text_encoder", "tokenizer")
    implements = {  # noqa: RUF012
        "patch_size": (1,),
        "in_channels": ANY,  # held against the VAE's latents
        "num_layers": ANY,
        "num_single_layers": ANY,
        "attention_head_dim": ANY,
        "num_attention_heads": ANY,
        "joint_attention_dim": ANY,
        "timestep_guidance_channels": ANY,
        "mlp_ratio": ANY,
        "axes_dims_rope": ANY,
        "rope_theta": ANY,
        "eps": ANY,
        "guidance_embeds": (False,),
    }
    settings = {"is_distilled": (True, False)}  # noqa: RUF012
    guidance = ClassifierFree()
    default_guidance_scale = 4.0
    flow = FlowTimes(shift="tokens and steps")
    usual_text_tokens = 512
    image_to_image = False

    def network(self, module: Any) -> Network:
        """See `Family`."""
        found = {"Flux2AttnProcessor": JointAttention, "Flux2ParallelSelfAttnProcessor": FusedAttention}
        install_joint(module, lambda processor: found.get(processor))
        return Flux2Network(module)

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        """See `Family`; four of the VAE's pixels are one."""
        return int(config["in_channels"]) // 4

    def input_channels(self, config: Mapping[str, Any]) -> int:
        """See `Family`."""
        return int(config["in_channels"])

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family`."""
        return {
            "patch_size": 1,
            "latent_channels": config["in_channels"],
            "latent_scale": 16,
            "default_steps": 50,
        }

    def native_size(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """See `Family`."""
        return 64, 64

    def limits(self, pipeline: Any) -> dict[str, Any]:
        """See `Family`; the distilled one has no guidance and is meant for few steps."""
        scale = {"latent_scale": 2 ** len(pipeline.vae.config.block_out_channels)}
        if not pipeline.config.is_distilled:
            return scale
        return {**scale, "default_steps": 4, "default_guidance_scale": 1.0, "max_guidance_scale": 1.0}

    def encode_texts(self, parts: Parts, texts: list[str]) -> Conditioning:
        """See `TextFamily`."""
        embeds, _ = parts.pipeline.encode_prompt(texts, device=parts.device, max_sequence_length=parts.text_tokens)
        return {"encoder_hidden_states": embeds}

    def decode(self, parts: Parts, latents: Tensor) -> Tensor:
        """See `Family`."""
        latents = latents.to(torch.promote_types(latents.dtype, parts.vae.dtype))
        white = parts.vae.bn
        mean = white.running_mean.view(1, -1, 1, 1).to(latents)
        spread = torch.sqrt(white.running_var.view(1, -1, 1, 1) + parts.vae.config.batch_norm_eps).to(latents)
        rows, channels, height, width = latents.shape
        latents = (latents * spread + mean).reshape(rows, channels // 4, 2, 2, height, width)
        return vae.decode(parts.vae, latents.permute(0, 1, 4, 2, 5, 3).reshape(rows, -1, 2 * height, 2 * width))

    def dummy(self, config: Mapping[str, Any], rows: int, text_tokens: int) -> Conditioning:
        """See `Family`."""
        return {"encoder_hidden_states": torch.empty(rows, text_tokens, self.text_dim(config), device="meta")}


FLUX2_KLEIN = Flux2Klein()
