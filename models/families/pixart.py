"""PixArt-α and PixArt-Σ (Chen et al., 2023, 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.families.base import Parts
from models.families.configs import ANY
from models.families.text import TextFamily
from models.guidance import ClassifierFree
from models.networks.attention import install
from models.networks.base import Network
from models.networks.dit import DiT
from models.request import Run
from models.reuse.rows import Conditioning

ALPHA, SIGMA = "PixArtAlphaPipeline", "PixArtSigmaPipeline"
TEXT_TOKENS = {ALPHA: 120, SIGMA: 300}
"""What the pipelines pad prompts to."""


class PixArt(TextFamily):
    """A transformer that attends to a T5 prompt under its mask."""

    name = "pixart"
    pipelines = (ALPHA, SIGMA)
    network_class = "PixArtTransformer2DModel"
    part = "transformer"
    kind = "dit"
    optional = ("text_encoder", "tokenizer")
    implements = {  # noqa: RUF012
        "num_attention_heads": ANY,
        "attention_head_dim": ANY,
        "in_channels": ANY,  # held against the VAE's latents
        "out_channels": ANY,
        "num_layers": ANY,
        "dropout": ANY,
        "norm_num_groups": ANY,
        "cross_attention_dim": ANY,
        "attention_bias": ANY,
        "sample_size": ANY,
        "patch_size": ANY,
        "activation_fn": ANY,
        "num_embeds_ada_norm": ANY,
        "upcast_attention": ANY,  # of no effect in diffusers' fused attention either
        "norm_type": ("ada_norm_single",),
        "norm_elementwise_affine": (False,),
        "norm_eps": ANY,
        "interpolation_scale": ANY,
        "use_additional_conditions": ANY,
        "caption_channels": ANY,
        "attention_type": ("default", None),
    }
    guidance = ClassifierFree()
    default_guidance_scale = 4.5
    usual_text_tokens = TEXT_TOKENS[ALPHA]
    inputs = TextFamily.inputs | {"prompt_attention_mask", "negative_prompt_attention_mask"}

    def network(self, module: Any) -> Network:
        """See `Family`."""
        network = DiT(module)
        install(module, network.reusable)
        return network

    def text_tokens(self, pipeline: Any) -> int:
        """See `Family`."""
        return TEXT_TOKENS[type(pipeline).__name__]

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family`."""
        return {"patch_size": config["patch_size"]}

    def text_dim(self, config: Mapping[str, Any]) -> int:
        """See `TextFamily`."""
        return int(config.get("caption_channels") or config["cross_attention_dim"])

    def encode_texts(self, parts: Parts, texts: list[str]) -> Conditioning:
        """See `TextFamily`."""
        embeds, mask, _, _ = parts.pipeline.encode_prompt(
            texts, max_sequence_length=parts.text_tokens, device=parts.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def given(self, parts: Parts, embeds: Tensor, mask: Tensor | None, pooled: Tensor | None) -> Conditioning:
        """See `TextFamily`; without a mask every token counts."""
        found = super().given(parts, embeds, mask, pooled)
        mask = torch.ones(embeds.shape[:2]) if mask is None else mask
        return {**found, "encoder_attention_mask": mask.to(parts.device)}

    def beside(self, parts: Parts, run: Run) -> Conditioning:
        """The 1024-pixel α is told the size of the picture."""
        if not _told_size(parts.config):
            return {}
        resolution = torch.tensor([(run.height, run.width)]).to(parts.device, parts.dtype)
        ratio = torch.tensor([[float(run.height / run.width)]]).to(parts.device, parts.dtype)
        return {"resolution": resolution, "aspect_ratio": ratio}

    def dummy(self, config: Mapping[str, Any], rows: int, text_tokens: int) -> Conditioning:
        """See `Family`."""
        sizes = {
            "encoder_hidden_states": (text_tokens, self.text_dim(config)),
            "encoder_attention_mask": (text_tokens,),
        }
        if _told_size(config):
            sizes |= {"resolution": (2,), "aspect_ratio": (1,)}
        return {name: torch.empty(rows, *size, device="meta") for name, size in sizes.items()}

    def forward(self, module: Any, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """See `Family`."""
        prediction: Tensor = module(
            x,
            timestep=t,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            encoder_attention_mask=conditioning["encoder_attention_mask"],
            added_cond_kwargs={name: conditioning.get(name) for name in ("resolution", "aspect_ratio")},
            return_dict=False,
        )[0]
        return prediction


def _told_size(config: Mapping[str, Any]) -> bool:
    given = config.get("use_additional_conditions")
    return bool(config["sample_size"] == 128 if given is None else given)


PIXART = PixArt()
