"""Stable Diffusion XL (Podell et al., 2023), the base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.families import unets
from models.families.base import Parts
from models.families.configs import ANY
from models.families.text import TextFamily, checked_pooled
from models.guidance import ClassifierFree
from models.request import Request, Run
from models.reuse.rows import Conditioning


class StableDiffusionXL(unets.TextUNet):
    """A U-Net on two text encoders, one of them pooled, that is told the size of the picture."""

    name = "sdxl"
    pipelines = (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    )
    optional = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    implements = unets.IMPLEMENTS | {
        "addition_embed_type": ("text_time",),
        "addition_time_embed_dim": ANY,
        "projection_class_embeddings_input_dim": ANY,
    }
    settings = {  # noqa: RUF012
        "force_zeros_for_empty_prompt": ANY,
        "add_watermarker": ANY,
        "requires_aesthetics_score": (False,),  # the refiner
    }
    guidance = ClassifierFree()
    default_guidance_scale = 5.0
    inputs = TextFamily.inputs | {"pooled_prompt_embeds", "negative_pooled_prompt_embeds"}

    def encode_texts(self, parts: Parts, texts: list[str]) -> Conditioning:
        """See `TextFamily`."""
        embeds, _, pooled, _ = parts.pipeline.encode_prompt(
            texts, num_images_per_prompt=1, device=parts.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def given(self, parts: Parts, embeds: Tensor, mask: Tensor | None, pooled: Tensor | None) -> Conditioning:
        """See `TextFamily`."""
        found = super().given(parts, embeds, mask, pooled)
        pooled = checked_pooled(pooled, _pooled_dim(parts.config))
        return {**found, "text_embeds": pooled.to(parts.device, parts.dtype)}

    def zeros_for_no_prompt(self, parts: Parts, request: Request) -> bool:
        """See `TextFamily`."""
        return bool(parts.pipeline.config.force_zeros_for_empty_prompt) and not request.negative_prompt

    def beside(self, parts: Parts, run: Run) -> Conditioning:
        """Original size, crop corner and target size, as the model was trained with."""
        size = (run.height, run.width)
        return {"time_ids": torch.tensor([[*size, 0, 0, *size]]).to(parts.device, parts.dtype)}

    def to_vae(self, latents: Tensor, config: Any) -> Tensor:
        """See `Family`; some of its VAEs whiten their latents."""
        if getattr(config, "latents_mean", None) is None:
            return super().to_vae(latents, config)
        mean, std = _statistics(config, latents)
        return latents * std / config.scaling_factor + mean  # type: ignore[no-any-return]

    def from_vae(self, latents: Tensor, config: Any) -> Tensor:
        """See `Family`."""
        if getattr(config, "latents_mean", None) is None:
            return super().from_vae(latents, config)
        mean, std = _statistics(config, latents)
        return (latents - mean) * config.scaling_factor / std  # type: ignore[no-any-return]

    def dummy(self, config: Mapping[str, Any], rows: int, text_tokens: int) -> Conditioning:
        """See `Family`."""
        pooled = _pooled_dim(config)
        added = {"text_embeds": pooled, "time_ids": 6}
        return unets.text(rows, text_tokens, config["cross_attention_dim"]) | {
            name: torch.empty(rows, dim, device="meta") for name, dim in added.items()
        }


def _statistics(config: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents by channel, [1, channels, 1, 1]."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1).to(like) for v in (config.latents_mean, config.latents_std))
    return mean, std


def _pooled_dim(config: Mapping[str, Any]) -> int:
    return int(config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"])


SDXL = StableDiffusionXL()
