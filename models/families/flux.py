"""Flux.1, dev and schnell (Black Forest Labs, 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.families.base import Parts
from models.families.configs import ANY
from models.families.mmdit import JointFamily
from models.guidance import ClassifierFree
from models.networks.attention import AttentionRows
from models.networks.base import Network
from models.networks.gated_blocks import BlockInputs
from models.networks.joint_attention import JointAttention, Rope, Streams, install_joint
from models.networks.joint_block import JointBegun, begun, bounded
from models.networks.mmdit import JointTransformer, Layout, joint_sites, pack, unpack
from models.networks.modules import by_rows
from models.networks.sites import feed_forward
from models.request import Run
from models.reuse.rows import Conditioning, Row


class FluxNetwork(JointTransformer):
    """diffusers' `FluxTransformer2DModel`: joint, then single blocks, with rotary positions."""

    def __init__(self, module: Any) -> None:
        config = module.config
        joint, single = int(config.num_layers), int(config.num_single_layers)
        modules = [("attention", "feed_forward")] * (joint + single)
        sites = joint_sites(module, int(config.in_channels) // 4, 2, modules, parallel=joint)
        super().__init__(module, module.transformer_blocks, module.single_transformer_blocks, sites)

    def begin(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, rows: Sequence[Row]
    ) -> tuple[Tensor, BlockInputs, Tensor]:
        """See `Transformer`."""
        image = self.module.x_embedder(pack(x))
        times = [t.to(x.dtype) / 1000]
        if "guidance" in conditioning:
            times.append(conditioning["guidance"])
        scaled = [time.to(image.dtype) * 1000 for time in times]
        embedded: Tensor = self.module.time_text_embed(*scaled, conditioning["pooled_projections"])
        text = self.module.context_embedder(conditioning["encoder_hidden_states"])
        rope = self._rope(text.shape[1], x.shape[-2] // 2, x.shape[-1] // 2, x.device, x.dtype)
        return torch.cat([text, image], dim=1), BlockInputs({"temb": embedded}, Layout(text.shape[1], rope)), embedded

    def _rope(self, text: int, height: int, width: int, device: torch.device, dtype: torch.dtype) -> Rope:
        def make() -> Rope:
            ids = torch.zeros(height, width, 3)
            ids[..., 1] += torch.arange(height)[:, None]
            ids[..., 2] += torch.arange(width)[None, :]
            every = torch.cat([torch.zeros(text, 3), ids.flatten(0, 1)]).to(device, dtype)
            cos, sin = self.module.pos_embed(every)
            return cos, sin

        return self.positions.get((text, height, width, device, dtype), make)

    def begun(self, block: Any, streams: Streams, inputs: BlockInputs) -> JointBegun:
        """See `JointTransformer`."""
        (image, text), time = streams, inputs.rows["temb"]
        return JointBegun(begun(block.norm1(image, emb=time)), begun(block.norm1_context(text, emb=time)))

    def single(self, block: Any, number: int, h: Tensor, inputs: BlockInputs, batch: AttentionRows | None) -> Tensor:
        """See `JointTransformer`."""
        attended, gate = block.norm(h, emb=inputs.rows["temb"])

        def both(batch: AttentionRows | None, x: Tensor) -> Tensor:
            core = block.attn(x, image_rotary_emb=inputs.shared.rope, rows=batch)
            out: Tensor = block.proj_out(torch.cat([core, block.act_mlp(block.proj_mlp(x))], dim=2))
            return out

        return bounded(h + gate.unsqueeze(1) * by_rows(feed_forward(number), batch, (attended,), both))

    def end(self, h: Tensor, inputs: BlockInputs, embedded: Tensor, size: tuple[int, int]) -> Tensor:
        """See `Transformer`."""
        h = self.module.norm_out(h[:, inputs.shared.text :], embedded)
        return unpack(self.module.proj_out(h), size)


class Flux(JointFamily):
    """T5 tokens beside the image's, a pooled CLIP prompt, and in dev the guidance scale as an input."""

    name = "flux"
    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline")
    network_class = "FluxTransformer2DModel"
    optional = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    unused = {"image_encoder": None, "feature_extractor": None}  # noqa: RUF012
    implements = {  # noqa: RUF012
        "patch_size": (1,),
        "in_channels": ANY,  # held against the VAE's latents
        "num_layers": ANY,
        "num_single_layers": ANY,
        "attention_head_dim": ANY,
        "num_attention_heads": ANY,
        "joint_attention_dim": ANY,
        "pooled_projection_dim": ANY,
        "guidance_embeds": (True, False),
        "axes_dims_rope": ANY,
    }
    guidance = ClassifierFree()
    guided_by = "true_cfg_scale"
    default_guidance_scale = 3.5
    usual_text_tokens = 512
    inputs = JointFamily.inputs | {"pooled_prompt_embeds", "negative_pooled_prompt_embeds", "true_cfg_scale"}

    def network(self, module: Any) -> Network:
        """See `Family`."""
        install_joint(module, lambda processor: JointAttention if processor == "FluxAttnProcessor" else None)
        return FluxNetwork(module)

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        """See `Family`; four latent pixels are a token."""
        return int(config["in_channels"]) // 4

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family`; without an input for it there is no scale, and few steps are meant."""
        if config["guidance_embeds"]:
            return {"patch_size": 2, "default_steps": 28}
        return {"patch_size": 2, "default_steps": 4, "default_guidance_scale": 1.0, "max_guidance_scale": 1.0}

    def encode_texts(self, parts: Parts, texts: list[str]) -> Conditioning:
        """See `TextFamily`."""
        embeds, pooled, _ = parts.pipeline.encode_prompt(
            texts, device=parts.device, max_sequence_length=parts.text_tokens
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def beside(self, parts: Parts, run: Run) -> Conditioning:
        """See `TextFamily`."""
        if not parts.config["guidance_embeds"]:
            return {}
        return {"guidance": torch.tensor([run.guidance_scale], dtype=torch.float32, device=parts.device)}

    def dummy(self, config: Mapping[str, Any], rows: int, text_tokens: int) -> Conditioning:
        """See `Family`."""
        sizes: dict[str, tuple[int, ...]] = {
            "encoder_hidden_states": (text_tokens, self.text_dim(config)),
            "pooled_projections": (config["pooled_projection_dim"],),
        }
        if config["guidance_embeds"]:
            sizes["guidance"] = ()
        return {name: torch.empty(rows, *size, device="meta") for name, size in sizes.items()}


FLUX = Flux()
