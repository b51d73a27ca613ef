"""InstructPix2Pix (Brooks et al., CVPR 2023): a Stable Diffusion that edits a picture as an instruction says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.errors import ModelLoadError
from models.families import unets
from models.families.base import Parts
from models.families.configs import ANY
from models.families.vae import posterior
from models.guidance import CONDITIONAL, Scales
from models.request import Run
from models.reuse.plans import Role
from models.reuse.rows import Conditioning

PICTURE: Role = "picture"
"""The row that sees the picture and no instruction."""
UNCONDITIONAL: Role = "unconditional"


@dataclass(frozen=True, slots=True)
class TextAndPicture:
    """Guidance of three rows: by the instruction away from the picture alone, by the picture away from neither."""

    roles: tuple[Role, ...] = (CONDITIONAL, PICTURE, UNCONDITIONAL)
    above: float = 1.0

    def weights(self, scales: Scales) -> dict[Role, float]:
        """See `Guidance`."""
        return {
            CONDITIONAL: scales.guidance,
            PICTURE: scales.image - scales.guidance,
            UNCONDITIONAL: 1.0 - scales.image,
        }

    def combine(self, predictions: Mapping[Role, Tensor], scales: Scales) -> Tensor:
        """See `Guidance`."""
        told = predictions[CONDITIONAL]
        if UNCONDITIONAL not in predictions:
            return told
        seen, free = predictions[PICTURE], predictions[UNCONDITIONAL]
        return free + scales.guidance * (told - seen) + scales.image * (seen - free)


class InstructPix2Pix(unets.TextUNet):
    """A U-Net on one CLIP text encoder that is given a picture, whose latents stand beside its own, and edits it."""

    name = "instruct_pix2pix"
    pipelines = ("StableDiffusionInstructPix2PixPipeline",)
    optional = ("text_encoder", "tokenizer")
    unused = {  # noqa: RUF012
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    }
    implements = unets.IMPLEMENTS
    settings = {"requires_safety_checker": ANY}  # noqa: RUF012
    guidance = TextAndPicture()
    default_guidance_scale = 7.5
    inputs = unets.TextUNet.inputs | {"image_guidance_scale"}
    edits = True
    default_image_guidance_scale = 1.5

    def refused(self, config: Mapping[str, Any]) -> str | None:
        """See `Family`; the picture's latents take as many channels as the U-Net's own."""
        if (reason := super().refused(config)) is not None:
            return reason
        given, own = config.get("in_channels"), config.get("out_channels", 4)
        return None if given == 2 * own else f"in_channels = {given}, with out_channels = {own},"

    def check_latents(self, config: Mapping[str, Any], latent_channels: int) -> None:
        """See `Family`."""
        if self.latent_channels(config) != latent_channels:
            reason = f"out_channels = {self.latent_channels(config)} are not the {latent_channels} of the VAE's latents"
            raise ModelLoadError(f"{self.part}/config.json: {reason}, which is not implemented for {self.name}")

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family`."""
        return {**super().facts(config), "inpaints": False}

    def dummy(self, config: Mapping[str, Any], rows: int, text_tokens: int) -> Conditioning:
        """See `Family`."""
        return unets.text(rows, text_tokens, config["cross_attention_dim"])

    def encode_texts(self, parts: Parts, texts: list[str]) -> Conditioning:
        """See `TextFamily`; this pipeline has no other method for it."""
        embeds = parts.pipeline._encode_prompt(texts, parts.device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds}

    def conditioning(self, parts: Parts, run: Run) -> dict[Role, Conditioning]:
        """See `Family`; without guidance the one row is told and sees."""
        rows = super().conditioning(parts, run)
        picture = run.request.image
        assert picture is not None  # noqa: S101 - `resolve` asks for it
        latents = posterior(parts.vae, picture, parts.device).mode().to(parts.dtype)
        if UNCONDITIONAL in rows:
            rows[PICTURE] = {**rows[UNCONDITIONAL], "beside": latents}
            rows[UNCONDITIONAL] = {**rows[UNCONDITIONAL], "beside": torch.zeros_like(latents)}
        rows[CONDITIONAL] = {**rows[CONDITIONAL], "beside": latents}
        return rows


INSTRUCT_PIX2PIX = InstructPix2Pix()
