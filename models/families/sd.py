"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.families import unets
from models.families.base import Parts
from models.families.configs import ANY
from models.families.text import TextFamily
from models.guidance import ClassifierFree
from models.networks.base import Network
from models.reuse.rows import Conditioning


class StableDiffusion(TextFamily):
    """A U-Net on one CLIP text encoder."""

    name = "sd"
    pipelines = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
    network_class = unets.CLASS
    part = "unet"
    kind = "unet"
    optional = ("text_encoder", "tokenizer")
    unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}  # noqa: RUF012
    implements = unets.IMPLEMENTS
    settings = {"requires_safety_checker": ANY}  # noqa: RUF012
    guidance = ClassifierFree()
    default_guidance_scale = 7.5

    def network(self, module: Any) -> Network:
        """See `Family`."""
        return unets.wrapped(module)

    def text_tokens(self, pipeline: Any) -> int:
        """See `Family`."""
        return int(getattr(pipeline.tokenizer, "model_max_length", self.usual_text_tokens))

    def encode_texts(self, parts: Parts, texts: list[str]) -> Conditioning:
        """See `TextFamily`."""
        embeds, _ = parts.pipeline.encode_prompt(
            texts, num_images_per_prompt=1, device=parts.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeds}

    def dummy(self, config: Mapping[str, Any], rows: int, text_tokens: int) -> Conditioning:
        """See `Family`."""
        return unets.text(rows, text_tokens, config["cross_attention_dim"])

    def forward(self, module: Any, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """See `Family`."""
        return unets.forward(module, x, t, conditioning)


SD = StableDiffusion()
