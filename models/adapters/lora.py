"""LoRA students: standard adapter files as tensors that travel with the rows, with nothing injected into the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils import convert_all_state_dict_to_peft
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.errors import ModelLoadError
from models.spec import AdapterInfo

JOINT_TARGETS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Projections of the text tokens where they attend together with the image's."""
FUSED_TARGETS = ("to_qkv_mlp_proj", "to_out")
"""Of an attention beside its MLP, with one projection in and one out for both."""
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
ALL_TARGETS = (*TARGETS, *JOINT_TARGETS, *FUSED_TARGETS)
WEIGHT_NAME = "pytorch_lora_weights.safetensors"

Source = Literal["hidden", "context", "core", "context core"]
"""What a projection reads: an attention's input, what it attends to where that is another tensor, or its core; and of
text tokens that attend together with the image's, their part of the core."""


@dataclass(frozen=True, eq=False, slots=True)
class Term:
    """What an adapter adds to the projections of one attention that read the same: one matmul serves them all."""

    down: Tensor  # [ranks, in]: theirs, one above the other
    ranks: tuple[int, ...]
    ups: tuple[tuple[str, Tensor], ...]  # projection and [rank, out] with the scale multiplied in, as `ranks`

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All it holds."""
        return (self.down, *(up for _, up in self.ups))

    def to(self, device: str) -> Term:
        """The same term on a device."""
        return Term(self.down.to(device), self.ranks, tuple((name, up.to(device)) for name, up in self.ups))


Terms = dict[tuple[str, Source], Term]
"""By attention path and what is read."""


@dataclass(frozen=True, eq=False)
class Lora:
    """A loaded adapter. Rows that run under it carry a reference; the base weights are untouched."""

    info: AdapterInfo
    terms: Terms

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors on the device."""
        return sum(t.nbytes for term in self.terms.values() for t in term.tensors)


def load_lora(path: str | Path, network: nn.Module, config_hash: str, name: str | None = None) -> Lora:
    """Read a LoRA file (or a directory with one) in diffusers' or PEFT's key format for `network`.

    The file's metadata says what was distilled: `guidance_scale`, and the base model's `config_hash`.
    Raises `ModelLoadError` for a target that is no attention projection of the network, or a foreign base model.
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
    try:
        scale = float(metadata["guidance_scale"])
    except (KeyError, ValueError) as error:
        raise ModelLoadError(f"{file}: its metadata does not say at which guidance_scale it was distilled") from error
    terms, rank = _terms(file, weights, metadata, network)
    parameters = sum(t.numel() for term in terms.values() for t in term.tensors)
    return Lora(
        AdapterInfo(name or Path(path).stem, scale, rank, parameters, metadata.get("negative_prompt", "")), terms
    )


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
        rank = down.shape[0]
        alpha = alphas.pop(target, float(settings.get("lora_alpha", rank)))
        path = target.removesuffix("." + projection)
        pair = (down.to(reference), (up.float() * (alpha / rank)).to(reference).t().contiguous())
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
    downs = [down for down, _ in pairs.values()]
    ups = tuple((name, up) for name, (_, up) in pairs.items())
    return Term(torch.cat(downs), tuple(len(down) for down in downs), ups)


def _peft_settings(file: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """PEFT's settings as diffusers writes them into a file, where it does; without them alpha is the rank."""
    settings = {k.split(".", 1)[-1]: v for k, v in json.loads(metadata.get("lora_adapter_metadata", "{}")).items()}
    strange = [name for name in ("use_dora", "use_rslora", "alpha_pattern", "lora_bias") if settings.get(name)]
    if strange:
        raise ModelLoadError(f"{file}: plain LoRA only, this one has {', '.join(strange)}")
    return settings


def meta_lora(lora: Lora) -> Lora:
    """The same adapter without storage, for counting MACs."""
    return Lora(lora.info, {key: term.to("meta") for key, term in lora.terms.items()})
