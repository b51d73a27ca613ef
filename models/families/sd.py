"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.families import unets
from models.families.base import Parts
from models.families.configs import ANY
from models.guidance import ClassifierFree
from models.reuse.rows import Conditioning


class StableDiffusion(unets.TextUNet):
    """A U-Net on one CLIP text encoder."""

    name = "sd"
    pipelines = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
    optional = ("text_encoder", "tokenizer")
    unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}  # noqa: RUF012
    implements = unets.IMPLEMENTS
    settings = {"requires_safety_checker": ANY}  # noqa: RUF012
    guidance = ClassifierFree()
    default_guidance_scale = 7.5

    def encode_texts(self, parts: Parts, texts: list[str]) -> Conditioning:
        """See `TextFamily`."""
        embeds, _ = parts.pipeline.encode_prompt(
            texts, num_images_per_prompt=1, device=parts.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeds}

    def dummy(self, config: Mapping[str, Any], rows: int, text_tokens: int) -> Conditioning:
        """See `Family`."""
        return unets.text(rows, text_tokens, config["cross_attention_dim"])


SD = StableDiffusion()
