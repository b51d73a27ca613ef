"""Adapter files: what they say of themselves, and their weights checked against the model that they are for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_all_state_dict_to_peft
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.adapters.lora import ALL_TARGETS, JOINT_TARGETS, WEIGHT_NAME, Lora, Source, Term, Terms
from models.errors import ModelLoadError
from models.spec import AdapterInfo


def load_lora(path: str | Path, network: nn.Module, config_hash: str, name: str | None = None) -> Lora:
    """Read a LoRA file (or a directory with one) in diffusers' or PEFT's key format for `network`.

    A guidance student's metadata says what was distilled: `guidance_scale`, and the base model's `config_hash`. Any
    other file is a style. Raises `ModelLoadError` for a target that is no attention projection of the network, for a
    foreign base model, and for values that are no numbers.
    """
    file = Path(path) / WEIGHT_NAME if Path(path).is_dir() else Path(path)
    try:
        with safe_open(file, "pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
            weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{file}: not a safetensors file: {error}") from error
    if metadata.get("config_hash", config_hash) != config_hash:
        raise ModelLoadError(
            f"{file}: distilled from another base model ({metadata['config_hash']}, not {config_hash})"
        )
    scale = _guidance_scale(file, metadata)
    _check_numbers(file, weights)
    terms, rank = _terms(file, weights, metadata, network)
    parameters = sum(t.numel() for term in terms.values() for t in term.tensors)
    negative = metadata.get("negative_prompt", "") if scale is not None else ""
    return Lora(AdapterInfo(name or Path(path).stem, scale, rank, parameters, negative), terms)


def _guidance_scale(file: Path, metadata: dict[str, str]) -> float | None:
    """At which scale a student was distilled; None for a style."""
    if "guidance_scale" not in metadata:
        return None
    try:
        scale = float(metadata["guidance_scale"])
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise ModelLoadError(f"{file}: its metadata does not say at which guidance_scale it was distilled")
    return scale


def _check_numbers(file: Path, weights: dict[str, Tensor]) -> None:
    for key, tensor in weights.items():
        if not tensor.is_floating_point() and not key.endswith(".alpha"):
            raise ModelLoadError(f"{file}: {key} is of {tensor.dtype}, which no LoRA weight is")
        if not bool(torch.isfinite(tensor.float()).all()):
            raise ModelLoadError(f"{file}: {key} has NaN or infinity in it")


def _terms(file: Path, weights: dict[str, Tensor], metadata: dict[str, str], network: nn.Module) -> tuple[Terms, int]:
    reference = next(network.parameters())
    shapes = {key.removesuffix(".weight"): t.shape for key, t in network.state_dict().items() if t.ndim == 2}
    weights = {k.removeprefix("unet.").removeprefix("transformer."): v for k, v in weights.items()}
    alphas = {k.removesuffix(".alpha"): float(v) for k, v in weights.items() if k.endswith(".alpha")}
    try:
        weights = convert_all_state_dict_to_peft({k: v for k, v in weights.items() if not k.endswith(".alpha")})
    except ValueError as error:
        raise ModelLoadError(f"{file}: these are no LoRA weights: {error}") from error
    settings = _peft_settings(file, metadata)
    found: dict[tuple[str, Source], dict[str, tuple[Tensor, Tensor]]] = {}
    rank = 0
    for key in weights:
        if key.endswith(".lora_B.weight") and key.replace("lora_B", "lora_A") in weights:
            continue
        target = key.removesuffix(".lora_A.weight")
        if target == key or f"{target}.lora_B.weight" not in weights:
            raise ModelLoadError(f"{file}: {key} is no half of a LoRA pair")
        projection = next((t for t in ALL_TARGETS if target.endswith("." + t)), None)
        down, up = weights[key], weights[f"{target}.lora_B.weight"]
        if projection is None or shapes.get(target) != (up.shape[0], down.shape[1]):
            raise ModelLoadError(f"{file}: {target} is no attention projection of this model")
        if len(down) != up.shape[1]:
            raise ModelLoadError(
                f"{file}: {target} has rank {len(down)} in its one half and {up.shape[1]} in the other"
            )
        rank = max(rank, len(down))
        alpha = alphas.pop(target, float(settings.get("lora_alpha", len(down))))
        path = target.removesuffix("." + projection)
        pair = (down.to(reference), (up.float() * (alpha / len(down))).to(reference).t().contiguous())
        found.setdefault((path, _source(network.get_submodule(path), projection)), {})[projection] = pair
    if alphas:
        raise ModelLoadError(f"{file}: {next(iter(alphas))}.alpha belongs to no LoRA pair")
    if not found:
        raise ModelLoadError(f"{file}: no LoRA weights found")
    return {key: _joined(pairs) for key, pairs in found.items()}, rank


def _source(attention: nn.Module, projection: str) -> Source:
    if projection in ("to_out.0", "to_out"):
        return "core"
    if projection in JOINT_TARGETS:
        return "context core" if projection == "to_add_out" else "context"
    crossed = projection in ("to_k", "to_v") and getattr(attention, "is_cross_attention", False)
    return "context" if crossed else "hidden"


def _joined(pairs: dict[str, tuple[Tensor, Tensor]]) -> Term:
    downs = {name: down for name, (down, _) in pairs.items()}
    ranks = {name: len(down) for name, down in downs.items()}
    return Term(torch.cat(list(downs.values())), ranks, {name: up for name, (_, up) in pairs.items()})


def _peft_settings(file: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """PEFT's settings as diffusers writes them into a file, where it does; without them alpha is the rank."""
    settings = {k.split(".", 1)[-1]: v for k, v in json.loads(metadata.get("lora_adapter_metadata", "{}")).items()}
    strange = [name for name in ("use_dora", "use_rslora", "alpha_pattern", "lora_bias") if settings.get(name)]
    if strange:
        raise ModelLoadError(f"{file}: plain LoRA only, this one has {', '.join(strange)}")
    return settings
