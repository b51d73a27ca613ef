"""Control networks from diffusers' directories: safetensors only, held against what is implemented and the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from safetensors import SafetensorError

from models.errors import ModelLoadError
from models.families.configs import ANY, Values, refused
from models.networks.control import ControlNet
from models.spec import ControlInfo

MOST = 16
"""Control networks of a model."""
IMPLEMENTS: dict[str, Values] = {
    "in_channels": ANY,  # these are held against the base
    "down_block_types": ANY,
    "block_out_channels": ANY,
    "layers_per_block": ANY,
    "cross_attention_dim": ANY,
    "addition_embed_type": ANY,
    "conditioning_channels": (3,),
    "flip_sin_to_cos": ANY,
    "freq_shift": ANY,
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "downsample_padding": ANY,
    "mid_block_scale_factor": ANY,
    "act_fn": ANY,
    "norm_num_groups": ANY,
    "norm_eps": ANY,
    "transformer_layers_per_block": ANY,
    "attention_head_dim": ANY,
    "use_linear_projection": ANY,
    "addition_time_embed_dim": ANY,
    "upcast_attention": ANY,
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "projection_class_embeddings_input_dim": ANY,
    "controlnet_conditioning_channel_order": ("rgb", "bgr"),
    "conditioning_embedding_out_channels": ANY,
    "global_pool_conditions": (False,),
    "addition_embed_type_num_heads": ANY,
}
"""What `models.networks.control` runs. Any other key must have diffusers' default, which changes nothing."""
OF_THE_BASE = (
    "down_block_types",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
)
"""What a control network has from the U-Net that it steers."""


def load_control(
    path: str | Path, name: str, base: Mapping[str, Any], latent_scale: int, device: torch.device, dtype: torch.dtype
) -> ControlNet:
    """A `ControlNetModel` in diffusers' layout for a U-Net with the config `base`. Raises `ModelLoadError`."""
    if not (Path(path) / "config.json").is_file():
        raise ModelLoadError(f"{path}: no config.json, this is no directory of a ControlNetModel")
    try:
        config = ControlNetModel.load_config(path, local_files_only=True)
        _check(path, config, base, latent_scale)
        module = ControlNetModel.from_pretrained(path, use_safetensors=True, local_files_only=True, torch_dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelLoadError(f"{path}: {error}") from error
    bad = next((key for key, weight in module.state_dict().items() if not bool(torch.isfinite(weight).all())), None)
    if bad is not None:
        raise ModelLoadError(f"{path}: {bad} is not finite")
    return ControlNet(name, module.to(device).eval().requires_grad_(False))


def info(network: ControlNet) -> ControlInfo:
    """What a `ModelSpec` says of it."""
    parameters = sum(p.numel() for p in network.module.parameters())
    return ControlInfo(network.name, parameters, int(network.module.config.block_out_channels[0]))


def _check(path: str | Path, config: Mapping[str, Any], base: Mapping[str, Any], latent_scale: int) -> None:
    if (found := config.get("_class_name")) != ControlNetModel.__name__:
        raise ModelLoadError(f"{path}: {found} is no {ControlNetModel.__name__}")
    if (bad := refused(config, ControlNetModel.__name__, IMPLEMENTS)) is not None:
        raise ModelLoadError(f"{path}: {bad} is not implemented for control networks")
    wanted = {key: base.get(key) for key in OF_THE_BASE} | {"in_channels": base["out_channels"]}
    for key, value in wanted.items():
        if _plain(config.get(key)) != _plain(value):
            raise ModelLoadError(f"{path}: {key} = {config.get(key)!r} where the model has {value!r}: of another base")
    halvings = len(config["conditioning_embedding_out_channels"]) - 1
    if 2**halvings != latent_scale:
        raise ModelLoadError(f"{path}: makes a {2**halvings}th of a picture, and the latents are a {latent_scale}th")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
