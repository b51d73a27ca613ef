"""Random style LoRAs, saved as PEFT and diffusers do, and diffusers' pipelines under several of them."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.adapters.lora import TARGETS


def network_of(pipeline: Any) -> Any:
    """Its denoising network."""
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def part_of(pipeline: Any) -> str:
    """And what the pipeline calls it."""
    return "unet" if hasattr(pipeline, "unet") else "transformer"


def random_lora(
    module: nn.Module, seed: int, *, rank: int = 2, targets: Sequence[str] = TARGETS, strength: float = 0.3
) -> dict[str, Tensor]:
    """Weights in PEFT's format for every layer of a module whose name ends like one of the targets."""
    copied = copy.deepcopy(module)
    inject_adapter_in_model(LoraConfig(r=rank, target_modules=list(targets), init_lora_weights=False), copied)
    generator = torch.Generator().manual_seed(seed)
    weights: Mapping[str, Tensor] = get_peft_model_state_dict(copied)
    return {key: strength * torch.randn(t.shape, generator=generator) for key, t in weights.items()}


def save_style(
    pipeline: Any, file: Path, seed: int, *, alpha: float | None = None, rank: int = 2, **options: Any
) -> Path:
    """A style for a pipeline's network, as diffusers saves it; `alpha` in its metadata."""
    part = part_of(pipeline)
    weights = random_lora(network_of(pipeline), seed, rank=rank, **options)
    header = {"format": "pt"}
    if alpha is not None:
        targets = list(options.get("targets", TARGETS))
        settings = {"r": rank, "lora_alpha": alpha, "target_modules": targets}
        header["lora_adapter_metadata"] = json.dumps({f"{part}.{k}": v for k, v in settings.items()})
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{part}.{key}": t for key, t in weights.items()}, file, header)
    return file


def under(pipeline: Any, styles: Mapping[Path, float]) -> Any:
    """A pipeline of its own under these files at these scales: by `set_adapters` where diffusers has it, else PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of a second adapter
        return _under(pipeline, styles)


def _under(pipeline: Any, styles: Mapping[Path, float]) -> Any:
    copied = copy.copy(pipeline)
    names = {part_of(pipeline), *(n for n in pipeline.components if n.startswith("text_encoder"))}
    parts = {name: copy.deepcopy(getattr(pipeline, name)) for name in names}
    if hasattr(pipeline, "load_lora_weights"):
        copied.register_modules(**parts)
        for i, file in enumerate(styles):
            copied.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"a{i}")
        copied.set_adapters([f"a{i}" for i in range(len(styles))], list(styles.values()))
        return copied
    for i, (file, scale) in enumerate(styles.items()):
        weights = {k.removeprefix("transformer."): t for k, t in load_file(file).items()}
        targets = sorted({key.rsplit(".lora_", 1)[0] for key in weights})
        rank = next(len(t) for key, t in weights.items() if "lora_A" in key)
        config = LoraConfig(r=rank, lora_alpha=rank * scale, target_modules=targets)
        inject_adapter_in_model(config, parts["transformer"], adapter_name=f"a{i}")
        assert not set_peft_model_state_dict(parts["transformer"], weights, adapter_name=f"a{i}").unexpected_keys
    for layer in parts["transformer"].modules():
        if hasattr(layer, "set_adapter") and hasattr(layer, "lora_A"):
            layer.set_adapter([f"a{i}" for i in range(len(styles)) if f"a{i}" in layer.lora_A])
    copied.register_modules(**parts)
    return copied
