"""What the families with a `UNet2DConditionModel` share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from models.errors import ModelLoadError
from models.families.configs import ANY, Values
from models.families.text import TextFamily
from models.networks.attention import install
from models.networks.base import Network
from models.networks.unet import UNet
from models.reuse.rows import Conditioning

CLASS = UNet2DConditionModel.__name__

IMPLEMENTS: dict[str, Values] = {
    "sample_size": ANY,
    "in_channels": ANY,  # held against the VAE's latents
    "out_channels": ANY,
    "center_input_sample": ANY,
    "flip_sin_to_cos": ANY,
    "freq_shift": ANY,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "only_cross_attention": (False,),
    "block_out_channels": ANY,
    "layers_per_block": ANY,
    "downsample_padding": ANY,
    "mid_block_scale_factor": ANY,
    "dropout": ANY,
    "act_fn": ANY,
    "norm_num_groups": ANY,
    "norm_eps": ANY,
    "cross_attention_dim": ANY,
    "transformer_layers_per_block": ANY,
    "reverse_transformer_layers_per_block": ANY,
    "attention_head_dim": ANY,
    "dual_cross_attention": (False,),
    "use_linear_projection": ANY,
    "upcast_attention": ANY,  # of no effect in diffusers' fused attention either
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "conv_in_kernel": ANY,
    "conv_out_kernel": ANY,
    "addition_embed_type_num_heads": ANY,
}
"""What `models.networks.unet` runs. A key that is not here must have diffusers' default, which changes nothing: so no
`time_cond_proj_dim` (the scale embedded, as in LCM), `class_embed_type`, `encoder_hid_dim_type`, `attention_type` …"""


class TextUNet(TextFamily):
    """A U-Net conditioned on text. One with more input channels than its latents fills in masked parts of pictures: it
    is given a mask and the latents of what that leaves."""

    network_class = CLASS
    part = "unet"
    kind = "unet"
    controllable = True

    def network(self, module: Any) -> Network:
        """See `Family`."""
        install(module)
        return UNet(module)

    def text_tokens(self, pipeline: Any) -> int:
        """See `Family`."""
        return int(getattr(pipeline.tokenizer, "model_max_length", self.usual_text_tokens))

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        """See `Family`."""
        return int(config["out_channels"])

    def input_channels(self, config: Mapping[str, Any]) -> int:
        """See `Family`."""
        return int(config["in_channels"])

    def check_latents(self, config: Mapping[str, Any], latent_channels: int) -> None:
        """See `Family`; a mask and the latents that it leaves may stand beside the latents."""
        given = self.input_channels(config)
        if given not in (latent_channels, 2 * latent_channels + 1):
            reason = f"in_channels = {given} are not the {latent_channels} of the VAE's latents"
            masked = f"nor {2 * latent_channels + 1} with a mask and what it leaves"
            place = f"{self.part}/config.json"
            raise ModelLoadError(f"{place}: {reason}, {masked}, which is not implemented for {self.name}")
        super().check_latents({**config, "in_channels": config["out_channels"]}, latent_channels)

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family`."""
        return {**super().facts(config), "inpaints": self.input_channels(config) != self.latent_channels(config)}

    def forward(self, module: Any, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """See `Family`."""
        return forward(module, x, t, conditioning)


def forward(module: Any, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """diffusers' own forward, with gradient."""
    added = {name: conditioning[name] for name in ("text_embeds", "time_ids") if name in conditioning}
    prediction: Tensor = module(
        x,
        timestep=t,
        encoder_hidden_states=conditioning["encoder_hidden_states"],
        added_cond_kwargs=added or None,
        return_dict=False,
    )[0]
    return prediction


def text(rows: int, tokens: int, dim: int) -> Conditioning:
    """Embedded prompts on the meta device."""
    return {"encoder_hidden_states": torch.empty(rows, tokens, dim, device="meta")}
