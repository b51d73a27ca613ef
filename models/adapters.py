"""LoRA students: standard adapter files as tensors that travel with the rows, with nothing injected into the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils import convert_all_state_dict_to_peft
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.errors import ModelLoadError
from models.spec import AdapterInfo

Terms = dict[tuple[str, str], tuple[Tensor, Tensor]]
"""(attention path, projection) -> (down [rank, in], up [out, rank] with the scale multiplied in)."""

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
WEIGHT_NAME = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True, eq=False)
class Lora:
    """A loaded adapter. Rows that run under it carry a reference; the base weights are untouched."""

    info: AdapterInfo
    terms: Terms

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors on the device."""
        return sum(t.nbytes for pair in self.terms.values() for t in pair)


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
    parameters = sum(t.numel() for pair in terms.values() for t in pair)
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
    terms: Terms = {}
    rank = 0
    for key in weights:
        if key.endswith(".lora_B.weight") and key.replace("lora_B", "lora_A") in weights:
            continue
        target = key.removesuffix(".lora_A.weight")
        if target == key or f"{target}.lora_B.weight" not in weights:
            raise ModelLoadError(f"{file}: {key} is no half of a LoRA pair")
        projection = next((t for t in TARGETS if target.endswith("." + t)), None)
        down, up = weights[key], weights[f"{target}.lora_B.weight"]
        if projection is None or shapes.get(target) != (up.shape[0], down.shape[1]):
            raise ModelLoadError(f"{file}: {target} is no attention projection of this model")
        rank = down.shape[0]
        alpha = alphas.get(target, float(settings.get("lora_alpha", rank)))
        pair = (down.to(reference), (up.float() * (alpha / rank)).to(reference))
        terms[target.removesuffix("." + projection), projection] = pair
    if not terms:
        raise ModelLoadError(f"{file}: no LoRA weights found")
    return terms, rank


def _peft_settings(file: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """PEFT's settings as diffusers writes them into a file, where it does; without them alpha is the rank."""
    settings = {k.split(".", 1)[-1]: v for k, v in json.loads(metadata.get("lora_adapter_metadata", "{}")).items()}
    strange = [name for name in ("use_dora", "use_rslora", "alpha_pattern", "lora_bias") if settings.get(name)]
    if strange:
        raise ModelLoadError(f"{file}: plain LoRA only, this one has {', '.join(strange)}")
    return settings


def meta_lora(lora: Lora) -> Lora:
    """The same adapter without storage, for counting MACs."""
    return Lora(lora.info, {k: (a.to("meta"), b.to("meta")) for k, (a, b) in lora.terms.items()})
