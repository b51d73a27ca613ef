"""A small Stable Diffusion pipeline as one file with the keys of the original checkpoints, as they are shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_single_file(pipeline: Any, file: Path) -> Path:
    """Write the weights of a `StableDiffusionPipeline` as one safetensors file."""
    tensors = {f"model.diffusion_model.{k}": v for k, v in _unet(pipeline.unet).items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in _vae(pipeline.vae).items()}
    text = pipeline.text_encoder.state_dict()
    prefix = "" if any(key.startswith("text_model.") for key in text) else "text_model."
    tensors |= {f"cond_stage_model.transformer.{prefix}{k}": v for k, v in text.items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, file)
    return file


def _renamed(key: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        key = key.replace(ours + ".", theirs + ".")
    return key


def _unet(unet: Any) -> dict[str, Tensor]:
    layers = unet.config.layers_per_block
    names = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    names |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    names |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    names["mid_block.resnets.1"] = "middle_block.2"
    for i, block in enumerate(unet.down_blocks):
        for j in range(layers):
            place = f"input_blocks.{(layers + 1) * i + j + 1}"
            names |= {f"down_blocks.{i}.resnets.{j}": f"{place}.0", f"down_blocks.{i}.attentions.{j}": f"{place}.1"}
        if block.downsamplers is not None:
            names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(layers + 1) * (i + 1)}.0.op"
    for i, block in enumerate(unet.up_blocks):
        for j in range(layers + 1):
            place = f"output_blocks.{(layers + 1) * i + j}"
            names |= {f"up_blocks.{i}.resnets.{j}": f"{place}.0", f"up_blocks.{i}.attentions.{j}": f"{place}.1"}
        if block.upsamplers is not None:
            last = 2 if hasattr(block, "attentions") else 1
            names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{(layers + 1) * (i + 1) - 1}.{last}.conv"
    found = {}
    for key, tensor in unet.state_dict().items():
        inner = _renamed(key, RESNET) if ".resnets." in key else key
        prefix = next(name for name in sorted(names, key=len, reverse=True) if key.startswith(name + "."))
        found[names[prefix] + inner.removeprefix(prefix)] = tensor
    return found


def _vae(vae: Any) -> dict[str, Tensor]:
    blocks = len(vae.config.block_out_channels)
    found = {}
    for key, tensor in vae.state_dict().items():
        for i in range(blocks):
            for j in range(vae.config.layers_per_block + 1):
                key = key.replace(f"encoder.down_blocks.{i}.resnets.{j}.", f"encoder.down.{i}.block.{j}.")
                key = key.replace(f"decoder.up_blocks.{i}.resnets.{j}.", f"decoder.up.{blocks - 1 - i}.block.{j}.")
            key = key.replace(f"encoder.down_blocks.{i}.downsamplers.0.", f"encoder.down.{i}.downsample.")
            key = key.replace(f"decoder.up_blocks.{i}.upsamplers.0.", f"decoder.up.{blocks - 1 - i}.upsample.")
        key = key.replace("mid_block.resnets.0.", "mid.block_1.").replace("mid_block.resnets.1.", "mid.block_2.")
        if "mid_block.attentions.0." in key:
            key = _renamed(key.replace("mid_block.attentions.0.", "mid.attn_1."), VAE_ATTENTION)
        key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        found[key] = tensor
    return found
