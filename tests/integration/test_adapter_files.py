"""What an adapter file may say of its scaling, layer by layer, against weights with the products folded in."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import Backbone, generate, load
from models.accelerators import CfgStudent
from models.adapters.files import load_lora
from models.adapters.lora import TARGETS, WEIGHT_NAME
from models.errors import ModelLoadError
from tests.integration.test_lora import drawn, network_of, student
from tests.integration.test_mixed import distance
from tests.pipelines import save_adapter

Pipelines = Callable[..., Any]
Directories = Callable[[str], Path]


def projections(network: nn.Module) -> list[str]:
    """The attention projections of a network by name."""
    return [name for name, _ in network.named_modules() if name.endswith(tuple(f".{t}" for t in TARGETS))]


def layers(network: nn.Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A low-rank pair for every projection, with a rank and an alpha that change from layer to layer."""
    torch.manual_seed(8)
    made = {}
    for i, name in enumerate(projections(network)):
        weight, rank = network.get_submodule(name).weight, 1 + i % 3
        assert isinstance(weight, Tensor)
        down, up = 0.2 * torch.randn(rank, weight.shape[1]), 0.2 * torch.randn(weight.shape[0], rank)
        made[name] = (down, up, 0.5 + i % 4)
    return made


def folded(pipeline: Any, pairs: dict[str, tuple[Tensor, Tensor, float]]) -> Any:
    """A pipeline of its own whose weights have every product added, scaled by alpha over rank."""
    copied, network = copy.copy(pipeline), copy.deepcopy(network_of(pipeline))
    for name, (down, up, alpha) in pairs.items():
        network.get_submodule(name).weight.data += alpha / len(down) * up @ down
    copied.register_modules(**{"unet" if hasattr(pipeline, "unet") else "transformer": network})
    return copied


def save(path: Path, tensors: dict[str, Tensor], settings: dict[str, Any] | None = None, **metadata: str) -> Path:
    header = {"guidance_scale": "4", **metadata}
    if settings is not None:
        header["lora_adapter_metadata"] = json.dumps(settings)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, header)
    return path


def named(pairs: dict[str, tuple[Tensor, Tensor, float]], prefix: str, style: str) -> dict[str, Tensor]:
    """The pairs under PEFT's or diffusers' names, each with its alpha."""
    down, up = {"peft": ("lora_A", "lora_B"), "diffusers": ("lora.down", "lora.up")}[style]
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        tensors[f"{prefix}.{name}.{down}.weight"], tensors[f"{prefix}.{name}.{up}.weight"] = pair[:2]
        tensors[f"{prefix}.{name}.alpha"] = torch.tensor(pair[2])
    return tensors


def latents(directory: Path, adapter: Path) -> Tensor:
    backbone: Backbone = load(str(directory), device="cpu", dtype="float32", adapters={"a": adapter})
    return generate(backbone, [student(backbone, acceleration=CfgStudent(adapter="a"))])[0].latents


@pytest.mark.parametrize(("layout", "style"), [("sd", "peft"), ("sd", "diffusers"), ("pixart-alpha", "peft")])
def test_every_layer_has_its_own_rank_and_alpha(
    layout: str, style: str, pipeline_of: Pipelines, pipeline_dir: Directories, tmp_path: Path
) -> None:
    """They count before the settings' one alpha for all."""
    pipeline = pipeline_of(layout)
    pairs = layers(network_of(pipeline))
    prefix = "unet" if layout == "sd" else "transformer"
    settings = {f"{prefix}.lora_alpha": 100.0, f"{prefix}.r": 3, f"{prefix}.alpha_pattern": {}}
    ours = latents(pipeline_dir(layout), save(tmp_path / "a.safetensors", named(pairs, prefix, style), settings))
    assert distance(ours, drawn(folded(pipeline, pairs))) <= 1e-5
    unscaled = {name: (down, up, float(len(down))) for name, (down, up, _) in pairs.items()}
    assert distance(ours, drawn(folded(pipeline, unscaled))) > 1e-3


@pytest.mark.parametrize("settings", [None, {"unet.lora_alpha": 5.0}, {"lora_alpha": 5.0}])
def test_one_alpha_for_all_is_over_each_layers_rank(
    settings: dict[str, Any] | None, pipeline_of: Pipelines, pipeline_dir: Directories, tmp_path: Path
) -> None:
    """Without any it is the rank, so that products count in full; one layer here has its own beside it."""
    pipeline = pipeline_of("sd")
    pairs = layers(pipeline.unet)
    own = next(iter(pairs))
    tensors = {k: v for k, v in named(pairs, "unet", "peft").items() if not k.endswith(".alpha") or f".{own}." in k}
    ours = latents(pipeline_dir("sd"), save(tmp_path / "a.safetensors", tensors, settings))
    expected = {
        name: (down, up, alpha if name == own else 5.0 if settings else float(len(down)))
        for name, (down, up, alpha) in pairs.items()
    }
    assert distance(ours, drawn(folded(pipeline, expected))) <= 1e-5


UNSUPPORTED: dict[str, Any] = {
    "use_dora": True,
    "use_rslora": True,
    "alpha_pattern": {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 3},
    "lora_bias": True,
}


@pytest.mark.parametrize("prefix", ["", "unet."])
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_would_scale_otherwise_is_refused_by_name(
    name: str, prefix: str, pipeline_of: Pipelines, tmp_path: Path
) -> None:
    unet = pipeline_of("sd").unet
    tensors = load_file(save_adapter(unet, tmp_path / "a") / WEIGHT_NAME)
    file = save(tmp_path / "b.safetensors", tensors, {prefix + name: UNSUPPORTED[name]})
    with pytest.raises(ModelLoadError, match=f"plain LoRA only, this one has {name}"):
        load_lora(file, unet, "hash")
    off = {prefix + other: type(value)() for other, value in UNSUPPORTED.items()}
    assert load_lora(save(tmp_path / "c.safetensors", tensors, off), unet, "hash").info.rank == 2


def test_an_alpha_of_no_layer_is_refused_by_name(pipeline_of: Pipelines, tmp_path: Path) -> None:
    """Under a name that is read otherwise it would be ignored, and the layer scaled wrongly."""
    unet = pipeline_of("sd").unet
    tensors = named(layers(unet), "unet", "peft")
    tensors["unet.mid_block.to_q.processor.alpha"] = torch.tensor(3.0)
    with pytest.raises(ModelLoadError, match=r"mid_block\.to_q\.processor\.alpha belongs to no LoRA pair"):
        load_lora(save(tmp_path / "a.safetensors", tensors), unet, "hash")


def test_what_a_file_says_of_itself(pipeline_of: Pipelines, tmp_path: Path) -> None:
    unet = pipeline_of("sd").unet
    adapter = save_adapter(unet, tmp_path / "mine", rank=3, guidance_scale=2.5, negative_prompt="dull")
    tensors = load_file(adapter / WEIGHT_NAME)
    for path, name in ((adapter, "mine"), (adapter / WEIGHT_NAME, "pytorch_lora_weights")):
        lora = load_lora(path, unet, "hash")
        assert (lora.info.name, lora.info.guidance_scale, lora.info.rank) == (name, 2.5, 3)
        assert lora.info.negative_prompt == "dull"
        assert lora.info.parameters == sum(t.numel() for t in tensors.values())
        assert lora.nbytes == 4 * lora.info.parameters
    assert load_lora(adapter, unet, "hash", "other").info.name == "other"
