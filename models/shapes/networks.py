"""The networks of shapes-sd (U-Net) and shapes-dit (PixArt transformer), their schedule, and one way to call both."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, PixArtTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from models.shapes.text import WIDTH, Encoded


def noise_scheduler() -> DDIMScheduler:
    """Stable Diffusion's betas, rescaled to end in pure noise: without that, flat backgrounds are never learned."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # unused with trailing spacing, but pipelines complain about any other value
    )


def build_unet() -> UNet2DConditionModel:
    """Three levels of 64, 96 and 128 channels; the lower two read the caption. 5.6 M parameters."""
    widths = (64, 96, 128)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=tuple(width // 32 for width in widths),  # a number of heads, for all its name
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
    )


def widened(folder: Path) -> UNet2DConditionModel:
    """The U-Net in `folder` with as many more input channels, of weight zero where it does not see a picture yet."""
    unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32)
    if unet.config.in_channels > unet.config.out_channels:
        return unet
    wider: UNet2DConditionModel = UNet2DConditionModel.from_config(unet.config, in_channels=2 * unet.config.in_channels)
    weights = unet.state_dict()
    weights["conv_in.weight"] = torch.cat([weights["conv_in.weight"], torch.zeros_like(weights["conv_in.weight"])], 1)
    wider.load_state_dict(weights)
    return wider


def build_transformer() -> PixArtTransformer2DModel:
    """Twelve blocks of width 192 over 64 tokens, 7.5 M parameters."""
    return PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=64,
        num_layers=12,
        in_channels=4,
        out_channels=4,
        sample_size=16,
        patch_size=2,
        cross_attention_dim=192,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )


def build(name: str) -> UNet2DConditionModel | PixArtTransformer2DModel:
    """The new denoiser of the bundled model `name`."""
    return build_unet() if name == "shapes-sd" else build_transformer()


def predict(network: nn.Module, latents: Tensor, timesteps: Tensor, captions: Encoded) -> Tensor:
    """The velocity [rows, 4, 16, 16] either network predicts for noisy `latents`."""
    extra: dict[str, Any] = {}
    if isinstance(network, PixArtTransformer2DModel):
        extra["encoder_attention_mask"] = captions.mask
        extra["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    velocity: Tensor = network(latents, timestep=timesteps, encoder_hidden_states=captions.tokens, **extra).sample
    return velocity
