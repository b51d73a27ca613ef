"""Adapter files: what they say of themselves, and their weights checked against the model that they are for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.adapters.formats import Convert, Pair, pairs_of
from models.adapters.lora import ALL_TARGETS, JOINT_TARGETS, WEIGHT_NAME, Lora, Source, Term
from models.errors import ModelLoadError
from models.spec import AdapterInfo

PEFT_NAME, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def load_lora(
    path: str | Path,
    network: nn.Module,
    config_hash: str,
    name: str | None = None,
    encoders: Mapping[str, nn.Module] = {},
    convert: Convert = dict,
) -> Lora:
    """Read a LoRA file (or a directory with one, diffusers' or PEFT's) for a network and its text encoders by name.

    A guidance student's metadata says what was distilled: `guidance_scale`, and the base model's `config_hash`. Any
    other file is a style. `convert` brings names that are not ours into diffusers' own.
    Raises `ModelLoadError` for what is no plain LoRA of this model, and for values that are no numbers.
    """
    file = _file(Path(path))
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
    part = "unet" if hasattr(network, "down_blocks") else "transformer"
    parts = {part: network, **encoders}
    try:
        settings = _settings(file, metadata, part)
        pairs = pairs_of(weights, parts, convert)
        found = [
            _layer(module, path, pair, settings.get(name, {})) for (name, path), pair, module in _each(pairs, parts)
        ]
    except ModelLoadError as error:
        raise ModelLoadError(f"{file}: {error}") from error
    split = _split(dict(zip(pairs, found, strict=True)), parts, part)
    negative = metadata.get("negative_prompt", "") if scale is not None else ""
    rank = max(len(down) for down, _ in found)
    parameters = sum(t.numel() for pair in found for t in pair)
    info = AdapterInfo(name or Path(path).stem, scale, rank, parameters, negative, bool(split[2]))
    return Lora(info, *split)


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    return path / (PEFT_NAME if (path / PEFT_NAME).is_file() else WEIGHT_NAME)


def _each(pairs: Mapping[tuple[str, str], Pair], parts: Mapping[str, nn.Module]) -> list[Any]:
    return [(at, pair, parts[at[0]].get_submodule(at[1])) for at, pair in pairs.items()]


def _layer(module: nn.Module, path: str, pair: Pair, settings: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Down [rank, in] (a convolution's [rank, in, h, w]) and up [rank, out] with the scale multiplied in."""
    down, up, rank = pair.down, pair.up, len(pair.down)
    if not isinstance(module, nn.Linear | nn.Conv2d) or getattr(module, "groups", 1) != 1:
        raise ModelLoadError(f"{path} is no linear layer and no convolution of this model")
    if isinstance(module, nn.Linear) and down.shape[2:].numel() == 1:
        down = down.flatten(1)
    elif isinstance(module, nn.Conv2d) and down.ndim == 2:
        down = down[..., None, None]
    if up.shape[2:].numel() == 1:
        up = up.flatten(1)
    if up.ndim != 2 or rank != up.shape[1]:
        raise ModelLoadError(f"{path} has rank {rank} in its one half and {tuple(up.shape)[1]} in the other")
    if (len(up), *down.shape[1:]) != tuple(module.weight.shape):
        found = (len(up), *down.shape[1:])
        raise ModelLoadError(
            f"{path} is for a layer of shape {found}, and that of this model is {tuple(module.weight.shape)}"
        )
    alpha = float(settings.get("lora_alpha", rank)) if pair.alpha is None else pair.alpha
    reference = module.weight
    return down.to(reference).contiguous(), (up.float() * (alpha / rank)).to(reference).t().contiguous()


Split = tuple[dict[tuple[str, Source], Term], dict[str, Term], dict[str, dict[str, Term]]]


def _split(
    layers: Mapping[tuple[str, str], tuple[Tensor, Tensor]], parts: Mapping[str, nn.Module], network: str
) -> Split:
    """The projections that attentions add themselves, other layers of the network, and those of text encoders."""
    attentions: dict[tuple[str, Source], dict[str, tuple[Tensor, Tensor]]] = {}
    others: dict[str, Term] = {}
    text: dict[str, dict[str, Term]] = {}
    for (part, path), pair in layers.items():
        projection = next((t for t in ALL_TARGETS if path.endswith("." + t)), None)
        owner = None if projection is None else parts[part].get_submodule(path.removesuffix("." + projection))
        if part == network and projection is not None and getattr(getattr(owner, "processor", None), "adapts", False):
            assert owner is not None  # noqa: S101
            key = path.removesuffix("." + projection), _source(owner, projection)
            attentions.setdefault(key, {})[projection] = pair
        else:
            (others if part == network else text.setdefault(part, {}))[path] = _joined({"": pair})
    return {key: _joined(pairs) for key, pairs in attentions.items()}, others, text


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


def _settings(file: Path, metadata: dict[str, str], network: str) -> dict[str, dict[str, Any]]:
    """PEFT's settings by part, where diffusers or PEFT wrote them; without them alpha is the rank."""
    given = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    beside = file.with_name(PEFT_CONFIG)
    if file.name == PEFT_NAME and beside.is_file():
        given = json.loads(beside.read_text())
    found: dict[str, dict[str, Any]] = {}
    for key, value in given.items():
        part, dot, name = key.partition(".")
        found.setdefault(part if dot else network, {})[name if dot else key] = value
    for settings in found.values():
        strange = [name for name in ("use_dora", "use_rslora", "alpha_pattern", "lora_bias") if settings.get(name)]
        if strange:
            raise ModelLoadError(f"plain LoRA only, this one has {', '.join(strange)}")
    return found
