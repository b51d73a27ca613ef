"""The key formats of LoRA files (kohya, diffusers, PEFT) as one: layers by part and path, with alpha multiplied in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from diffusers.utils import convert_all_state_dict_to_peft
from torch import Tensor, nn

from models.errors import ModelLoadError

Weights = dict[str, Tensor]
Convert = Callable[[Weights], Weights]
"""A file's weights in names of diffusers' own, where they have others: its pipelines know the ways to name them."""
KOHYA = {
    "lora_unet_": ("unet", "transformer"),
    "lora_transformer_": ("transformer",),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3",),
}
PAIRS = (
    ("lora_down.weight", "lora_up.weight"),
    ("lora_A.weight", "lora_B.weight"),
    ("lora.down.weight", "lora.up.weight"),
)
OTHERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "a Tucker decomposition",
    "oft_": "OFT",
    "lora_bias": "a bias",
    "lora_B.bias": "a bias",
    "diff_b": "a difference of weights",
    ".diff": "a difference of weights",
}


@dataclass(frozen=True, slots=True)
class Pair:
    """The two halves of one layer: down [rank, in, ...] and up [out, rank, ...]; alpha where the file has it."""

    down: Tensor
    up: Tensor
    alpha: float | None = None


def pairs_of(weights: Weights, parts: Mapping[str, nn.Module], convert: Convert) -> dict[tuple[str, str], Pair]:
    """By part of the pipeline and path in it. Raises `ModelLoadError` for what is no plain LoRA of these parts."""
    for key in weights:
        if (kind := next((kind for mark, kind in OTHERS.items() if mark in key), None)) is not None:
            raise ModelLoadError(f"plain LoRA only, this one has {kind} ({key})")
    weights = {key.removeprefix("base_model.model."): tensor for key, tensor in weights.items()}
    named = _from_kohya(weights, parts)
    if named is None and not _known(weights, parts):
        try:
            weights = convert(_folded(weights))
        except (ValueError, KeyError, IndexError, AttributeError) as error:
            raise ModelLoadError(f"these are no LoRA weights of this model: {str(error).strip()[:200]}") from error
    return _paired(weights if named is None else named, parts)


def _from_kohya(weights: Weights, parts: Mapping[str, nn.Module]) -> Weights | None:
    """Kohya's names are paths with underscores for dots; None where a layer is not one of ours under any prefix."""
    known = {
        (part, path.replace(".", "_")): path for part, module in parts.items() for path, _ in module.named_modules()
    }
    found: Weights = {}
    for key, tensor in weights.items():
        name, _, rest = key.partition(".")
        prefix = next((prefix for prefix in KOHYA if name.startswith(prefix)), None)
        if prefix is None:
            return None
        under = name.removeprefix(prefix)
        tries = [
            (p, n) for p in KOHYA[prefix] for n in (under, under.removeprefix("text_model_"), f"text_model_{under}")
        ]
        at = next((one for one in tries if one in known), None)
        if at is None:
            return None
        rest = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}.get(rest, rest)
        found[f"{at[0]}.{known[at]}.{rest}"] = tensor
    return found


def _known(weights: Weights, parts: Mapping[str, nn.Module]) -> bool:
    """Whether every name is, once diffusers has written it its one way, a layer of ours."""
    try:
        return all(_placed(key, parts) is not None for key in _peft(weights))
    except ValueError:
        return False


def _peft(weights: Weights) -> Weights:
    halves = {key: tensor for key, tensor in weights.items() if not key.endswith(".alpha")}
    return dict(convert_all_state_dict_to_peft(halves))


def _placed(key: str, parts: Mapping[str, nn.Module]) -> tuple[str, str] | None:
    """The part and the path of a half's layer; without a part it is the network's, the first."""
    layer = key.rsplit(".lora_", 1)[0]
    part, _, path = layer.partition(".")
    if part not in parts:
        part, path = next(iter(parts)), layer
    for name in (path, path.removeprefix("text_model."), f"text_model.{path}"):
        try:
            parts[part].get_submodule(name)
        except AttributeError:
            continue
        return part, name
    return None


def _folded(weights: Weights) -> Weights:
    """Alphas multiplied in, so that no conversion can lose one."""
    found = dict(weights)
    for key in [key for key in weights if key.endswith(".alpha")]:
        layer = key.removesuffix(".alpha")
        for down, up in PAIRS:
            if f"{layer}.{down}" in found and f"{layer}.{up}" in found:
                scale = float(found.pop(key)) / len(found[f"{layer}.{down}"])
                found[f"{layer}.{up}"] = found[f"{layer}.{up}"].float() * scale
                break
    return found


def _paired(weights: Weights, parts: Mapping[str, nn.Module]) -> dict[tuple[str, str], Pair]:
    alphas = {key.removesuffix(".alpha"): float(t) for key, t in weights.items() if key.endswith(".alpha")}
    try:
        halves = _peft(weights)
    except ValueError as error:
        raise ModelLoadError(f"these are no LoRA weights: {error}") from error
    found: dict[tuple[str, str], Pair] = {}
    for key, tensor in halves.items():
        if key.endswith(".lora_B.weight") and key.replace("lora_B", "lora_A") in halves:
            continue
        layer = key.removesuffix(".lora_A.weight")
        if layer == key or f"{layer}.lora_B.weight" not in halves:
            raise ModelLoadError(f"{key} is no half of a LoRA pair")
        if (at := _placed(key, parts)) is None:
            raise ModelLoadError(f"{layer} is no layer of this model")
        found[at] = Pair(tensor, halves[f"{layer}.lora_B.weight"], alphas.pop(layer, None))
    if alphas:
        raise ModelLoadError(f"{next(iter(alphas))}.alpha belongs to no LoRA pair")
    if not found:
        raise ModelLoadError("no LoRA weights found")
    return found
