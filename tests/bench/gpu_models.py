"""The published architectures with random weights, in diffusers' layout and without text encoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

import models
from tests.bench.harness import note
from tests.bench.zoo import CACHE, Model

WIDTHS = (320, 640, 1280, 1280)


def _sd15() -> Any:
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=WIDTHS, attention_head_dim=8, cross_attention_dim=768
    )
    return StableDiffusionPipeline(
        **_parts(),
        unet=unet,
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=WIDTHS[:3],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    nothing = {"text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    return StableDiffusionXLPipeline(**_parts(0.13025), **nothing, unet=unet, add_watermarker=False)


def _dit(side: int) -> Callable[[], Any]:
    def make() -> Any:
        transformer = DiTTransformer2DModel(sample_size=side, out_channels=8)  # diffusers' defaults are XL/2
        return DiTPipeline(transformer=transformer, **_parts())

    return make


def _pixart(side: int) -> Callable[[], Any]:
    def make() -> Any:
        transformer = PixArtTransformer2DModel(
            sample_size=side, interpolation_scale=side // 64, caption_channels=4096, use_additional_conditions=False
        )
        return PixArtSigmaPipeline(transformer=transformer, text_encoder=None, tokenizer=None, **_parts(0.13025))

    return make


def _parts(scaling: float = 0.18215) -> dict[str, Any]:
    widths = (128, 256, 512, 512)
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
        scaling_factor=scaling,
    )
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = DDIMScheduler(**betas, steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    return {"vae": vae, "scheduler": scheduler}


MODELS: dict[str, Callable[[], Any]] = {
    "sd15-512": _sd15,
    "sdxl-1024": _sdxl,
    "dit-xl2-256": _dit(32),
    "dit-xl2-512": _dit(64),
    "pixart-sigma-512": _pixart(64),
    "pixart-sigma-1024": _pixart(128),
}
PEAK_TFLOPS = {
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "4090": 165,
    "3090": 71,
    "A10": 125,
    "T4": 65,
}
"""Dense half-precision matrix rates by the makers' data sheets, in TFLOP/s."""


def gpu_model(name: str, device: str, dtype: str, channels_last: bool) -> Model:
    """A model on the device; `NAME-tiny` is a stand-in of the tests for a run without a GPU."""
    folder = CACHE / name
    if not (folder / "model_index.json").is_file():
        note(f"making {name}")
        _make(name, folder, device)
    backbone = models.load(str(folder), device=device, dtype=dtype)
    if channels_last and backbone.spec.family == "unet":
        backbone.network.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        backbone.parts.vae.to(memory_format=torch.channels_last)
    return Model(name, folder, backbone, given=_given(backbone))


def _make(name: str, folder: Path, device: str) -> None:
    if name.endswith("-tiny"):
        from tests.pipelines import save_pipeline

        made = save_pipeline(name.removesuffix("-tiny"), CACHE)
        made.rename(folder)
        return
    torch.manual_seed(0)
    with torch.device(device):
        pipeline = MODELS[name]()
    pipeline.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)


def _given(backbone: Any) -> dict[str, Any]:
    spec, config = backbone.spec, backbone.network.module.config
    if spec.layout == "dit":
        return {"class_label": 7}
    if spec.has_text_encoder:
        return {"prompt": "a photograph"}
    tokens, width = (300, config.caption_channels) if spec.layout == "pixart" else (77, config.cross_attention_dim)
    given = {name: torch.randn(1, tokens, width) for name in ("prompt_embeds", "negative_prompt_embeds")}
    if spec.layout == "sdxl":
        given |= {name: torch.randn(1, 1280) for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}
    return given
