"""Small Stable Diffusion pipelines as one file with the keys of the original checkpoints, as they are shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
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
OPEN_CLIP = {
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings": "embeddings",
    "text_model.final_layer_norm": "ln_final",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_single_file(pipeline: Any, file: Path) -> Path:
    """Write the weights of a `StableDiffusionPipeline`, or of one of SDXL, as one safetensors file."""
    tensors = {f"model.diffusion_model.{k}": v for k, v in _unet(pipeline.unet).items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in _vae(pipeline.vae).items()}
    if hasattr(pipeline, "text_encoder_2"):
        first, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
        tensors |= {first + k: v for k, v in _text(pipeline.text_encoder).items()}
        tensors |= {second + k: v for k, v in _open_clip(_text(pipeline.text_encoder_2)).items()}
    else:
        tensors |= {f"cond_stage_model.transformer.{k}": v for k, v in _text(pipeline.text_encoder).items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, file)
    return file


def _text(encoder: Any) -> dict[str, Tensor]:
    """The weights of a CLIP text encoder under the names that they have always had."""
    weights: dict[str, Tensor] = encoder.state_dict()
    bare = not any(key.startswith("text_model.") for key in weights)
    return {k if not bare or k.startswith("text_projection") else f"text_model.{k}": v for k, v in weights.items()}


def _open_clip(text: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same as OpenCLIP stores them: queries, keys and values as one matrix."""
    found = {}
    for key, tensor in text.items():
        if ".q_proj." in key:
            parts = [text[key.replace("q_proj", f"{name}_proj")] for name in "qkv"]
            found[_renamed(key, OPEN_CLIP).replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif ".k_proj." not in key and ".v_proj." not in key:
            projects = key == "text_projection.weight"
            found["text_projection" if projects else _renamed(key, OPEN_CLIP)] = tensor.T if projects else tensor
    embedding = found.pop("embeddings.position_embedding.weight")
    return {**found, "positional_embedding": embedding}


def _renamed(key: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        key = key.replace(ours + ".", theirs + ".")
    return key


def _unet(unet: Any) -> dict[str, Tensor]:
    layers = unet.config.layers_per_block
    names = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    names |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    names |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
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
