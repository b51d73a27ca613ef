"""Community files: kohya's and PEFT's names, convolutions, feed-forwards, text encoders; diffusers as oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import Backbone, generate, load
from models.request import LoraScale
from tests.integration.test_loras import asked, drawn, packed, request
from tests.integration.test_mixed import distance
from tests.styles import network_of, part_of, random_lora, under

Pipelines = Callable[..., Any]
Directories = Callable[[str], Path]
UNET = ("to_q", "to_k", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "conv1", "conv_shortcut", "time_emb_proj")
UNET_ALL = (*UNET, "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "linear_1")
TARGETS: dict[str, tuple[str, ...]] = {
    "sd": UNET_ALL,
    "sdxl": UNET_ALL[:-1],  # diffusers loses kohya's add_embedding_linear_1
    "pixart-alpha": ("to_q", "to_v", "ff.net.2", "proj_out", "caption_projection.linear_1", "adaln_single.linear"),
    "flux-dev": ("to_q", "add_k_proj", "to_add_out", "ff.net.2", "norm1.linear", "proj_mlp", "proj_out", "x_embedder"),
    "sd3": ("to_q", "add_k_proj", "ff.net.0.proj", "norm1.linear", "context_embedder", "proj_out"),
}
TEXT = ("q_proj", "v_proj", "out_proj", "fc1")


def kohya(weights: dict[str, Tensor], prefix: str, alpha: float) -> dict[str, Tensor]:
    """PEFT's names as kohya writes them, with an alpha a layer."""
    found: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        layer, _, half = key.removesuffix(".weight").rpartition(".")
        name = prefix + layer.replace(".", "_")
        found[f"{name}.lora_{'down' if half == 'lora_A' else 'up'}.weight"] = tensor
        found[f"{name}.alpha"] = torch.tensor(alpha)
    return found


def saved(pipeline: Any, layout: str, style: str, seed: int, folder: Path) -> Path:
    """A random file with the layout's targets, and the text encoders' where the format has them."""
    weights = random_lora(network_of(pipeline), seed, targets=TARGETS[layout], rank=2 + seed, strength=0.15)
    file = folder / f"{style}{seed}.safetensors"
    encoders = ["text_encoder", "text_encoder_2"] if layout == "sdxl" else ["text_encoder"] if layout == "sd" else []
    texts = {name: random_lora(getattr(pipeline, name), seed, targets=TEXT, rank=2, strength=0.15) for name in encoders}
    if style == "kohya":
        tensors = kohya(weights, "lora_unet_", 3.0)
        prefixes = {"text_encoder": "lora_te1_" if layout == "sdxl" else "lora_te_", "text_encoder_2": "lora_te2_"}
        for name, text in texts.items():
            within = {k if k.startswith("text_") else f"text_model.{k}": t for k, t in text.items()}
            tensors |= kohya(within, prefixes[name], 1.0)
    else:
        tensors = {f"{part_of(pipeline)}.{key}": t for key, t in weights.items()}
        tensors |= {f"{name}.{key}": t for name, text in texts.items() for key, t in text.items()}
    folder.mkdir(exist_ok=True)
    save_file({key: t.contiguous() for key, t in tensors.items()}, file, {"format": "pt"})
    return file


@pytest.mark.parametrize(
    ("layout", "style"), [("sd", "kohya"), ("sdxl", "kohya"), ("sd", "peft"), *((n, "peft") for n in list(TARGETS)[2:])]
)
def test_files_with_all_their_layers_equal_diffusers(
    layout: str, style: str, pipeline_of: Pipelines, pipeline_dir: Directories, tmp_path: Path
) -> None:
    """One and two styles, alone and beside plain rows and each other."""
    pipeline = pipeline_of(layout)
    files = {f"s{seed}": saved(pipeline, layout, style, seed, tmp_path) for seed in (1, 2, 3)}
    backbone: Backbone = load(str(pipeline_dir(layout)), device="cpu", dtype="float32", adapters=files)
    asks: list[dict[str, float]] = [{"s1": 1.0}, {"s1": 0.6, "s2": -0.5}, {"s3": 0.8}, {}]
    requests = [request(*(LoraScale(n, s) for n, s in ask.items()), **asked(layout)) for ask in asks]
    together = generate(backbone, requests)
    plain = drawn(layout, pipeline)
    for ask, one, mixed in zip(asks, requests, together, strict=True):
        alone = generate(backbone, [one])[0]
        assert distance(mixed.latents, alone.latents) <= 1e-4
        if len(ask) and ask != {"s3": 0.8}:
            expected = drawn(layout, under(pipeline, {files[n]: s for n, s in ask.items()}))
            assert distance(packed(layout, alone.latents), expected) <= 1e-4
            assert distance(expected, plain) > 5e-3
    assert distance(packed(layout, together[-1].latents), plain) <= 1e-4


def test_the_model_is_as_it_was(pipeline_of: Pipelines, pipeline_dir: Directories, tmp_path: Path) -> None:
    """Not a weight, a module or an attribute of it is another after a run under convolutions and text parts."""
    file = saved(pipeline_of("sd"), "sd", "kohya", 1, tmp_path)
    backbone = load(str(pipeline_dir("sd")), device="cpu", dtype="float32", adapters={"s": file})
    before = generate(backbone, [request()])[0]
    modules = [backbone.network.module, *backbone.parts.encoders()]
    state = [{name: dict(vars(child)) for name, child in module.named_modules()} for module in modules]
    styled = generate(backbone, [request(LoraScale("s"))])[0]
    assert [{name: dict(vars(child)) for name, child in module.named_modules()} for module in modules] == state
    assert torch.equal(generate(backbone, [request()])[0].latents, before.latents)
    assert styled.usage.macs > before.usage.macs
    assert styled.usage.macs_unaccelerated == before.usage.macs
    assert backbone.adapter_bytes() == 4 * backbone.spec.adapters["s"].parameters
    assert len(load_file(file)) * 2 // 3 >= 2 * len(UNET)
