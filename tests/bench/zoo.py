"""The models that are measured, each as a directory in diffusers' layout.

`shapes-sd` and `shapes-dit` are the bundled ones, or random weights of their architecture where none is bundled; the
two of 60 M parameters and more have random weights, for time does not depend on them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from safetensors.torch import save_file
from torch import nn

import models
from models import Backbone
from models.loading import BUNDLED
from models.shapes import vae
from models.shapes.export import save
from models.shapes.networks import build_transformer, build_unet
from models.shapes.text import WIDTH, TextEncoder
from tests.bench.harness import ROOT

CACHE = ROOT / "runs" / "bench" / "models"
SMALL = ("shapes-sd", "shapes-dit")
LARGE = ("unet-65m", "pixart-69m")
STUDENT = "student"
STUDENT_SCALE = 4.0
RANK = 16


@dataclass(frozen=True)
class Model:
    """A model under measurement: ours, and the directory from which a peer can load the same."""

    name: str
    directory: Path
    backbone: Backbone
    bundled: bool = False
    given: Mapping[str, Any] = field(default_factory=dict)  # what requests name in place of a prompt

    @property
    def family(self) -> str:
        """unet or dit."""
        return self.backbone.spec.family

    @property
    def prompt(self) -> str:
        """Any prompt."""
        return next(iter(self.backbone.spec.examples), "a large red circle on a white background")

    def pipeline(self) -> Any:
        """diffusers' own pipeline of the same files."""
        dtype, device = self.backbone.dtype, self.backbone.device
        pipeline = DiffusionPipeline.from_pretrained(self.directory, dtype=dtype, local_files_only=True).to(device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def names(options: Any) -> Sequence[str]:
    """The models that `--models` asks for; a quick run takes the small ones."""
    return [name for name in options.models if not options.quick or name in SMALL]


def place(name: str) -> Path:
    """The directory of a model by name, made where it is not there."""
    return BUNDLED / name if (BUNDLED / name / "model_index.json").is_file() else _made(name)


@cache
def model(name: str) -> Model:
    """A model by name, loaded on the CPU; it has a guidance student, its own or a random one."""
    directory = place(name)
    backbone = models.load(str(directory), device="cpu", dtype="float32")
    if not backbone.spec.adapters:
        file = CACHE / f"{name}-{STUDENT}" / "pytorch_lora_weights.safetensors"
        if not file.is_file():
            random_adapter(backbone.network.module, file)
        backbone = models.load(str(directory), device="cpu", dtype="float32", adapters={STUDENT: file})
    return Model(name, directory, backbone, directory.parent == BUNDLED)


def random_adapter(network: nn.Module, file: Path, rank: int = RANK) -> None:
    """A LoRA on every attention projection, in diffusers' keys, with the metadata that serving asks for."""
    weights: dict[str, torch.Tensor] = {}
    for path, module in network.named_modules():
        if isinstance(module, Attention):
            for name, layer in (("to_q", module.to_q), ("to_k", module.to_k), ("to_v", module.to_v)):
                weights |= _terms(f"{path}.{name}", layer, rank)
            weights |= _terms(f"{path}.to_out.0", module.to_out[0], rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, file, {"guidance_scale": str(STUDENT_SCALE), "lora_alpha": str(rank)})


def _terms(path: str, layer: Any, rank: int) -> dict[str, torch.Tensor]:
    down, up = torch.randn(rank, layer.in_features) * 0.02, torch.randn(layer.out_features, rank) * 0.02
    return {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up}


def large_unet() -> UNet2DConditionModel:
    """shapes-sd's plan with widths of 160, 256 and 384 channels, 65 M parameters."""
    widths = (160, 256, 384)
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=tuple(width // 32 for width in widths),
        cross_attention_dim=WIDTH,
    )


def large_transformer() -> PixArtTransformer2DModel:
    """Sixteen blocks of width 512, 69 M parameters."""
    return PixArtTransformer2DModel(
        num_attention_heads=8,
        attention_head_dim=64,
        num_layers=16,
        in_channels=4,
        out_channels=4,
        sample_size=32,
        patch_size=2,
        cross_attention_dim=512,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )


_NETWORKS = {
    "shapes-sd": ("clip", build_unet),
    "shapes-dit": ("t5", build_transformer),
    "unet-65m": ("clip", large_unet),
    "pixart-69m": ("t5", large_transformer),
}


def _made(name: str) -> Path:
    folder = CACHE / name
    if not (folder / "slipstream.json").is_file():
        torch.manual_seed(0)
        text, network = _NETWORKS[name]
        folder.mkdir(parents=True, exist_ok=True)
        built = network()
        save(folder, vae.build(), TextEncoder(text), built)
        side = 4 * built.config.sample_size
        facts = json.loads((folder / "slipstream.json").read_text())
        (folder / "slipstream.json").write_text(json.dumps({**facts, "native_width": side, "native_height": side}))
    return folder
