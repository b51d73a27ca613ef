"""The MAC counts against the figures of the papers and their code, from bare configs on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from models import macs
from models.accelerators import DeepCache, DeltaDiT, DepthSkip
from models.costs.counter import MacCounter
from models.errors import ModelLoadError, WrongBackbone
from models.networks.sites import level
from models.networks.unet import truncate
from models.reuse.plans import Reading, Recall, RowPlan

CIFAR: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
}
SD15: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
DIT_XL: dict[str, Any] = {
    "_class_name": "DiTTransformer2DModel",
    "sample_size": 32,
    "num_layers": 28,
    "patch_size": 2,
    "attention_head_dim": 72,
    "num_attention_heads": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_embeds_ada_norm": 1000,
}


@pytest.fixture(scope="module")
def sd15() -> MacCounter:
    return MacCounter(SD15)


def giga(count: float, wanted: float) -> None:
    assert count / 1e9 == pytest.approx(wanted, rel=0.01)


def test_cifar_full_and_shallow() -> None:
    counts = MacCounter(CIFAR).at((32, 32))
    giga(counts.row(RowPlan()), 6.222)
    giga(MacCounter(CIFAR, attention_matmuls=False).at((32, 32)).row(RowPlan()), 6.054)
    for branch, wanted in enumerate([0.494, 1.283, 2.239, 3.384]):
        giga(counts.row(RowPlan(reads={level(branch): Reading(Recall())})), wanted)


@pytest.mark.parametrize(("interval", "wanted"), [(10, 2.637), (5, 3.036), (3, 3.593), (2, 4.230)])
def test_cifar_deepcache_is_the_papers(interval: int, wanted: float) -> None:
    report = macs(CIFAR, acceleration=DeepCache(interval=interval, branch=2), num_inference_steps=100)
    giga(report.image / 100, wanted)


def test_sd15_full_and_shallow(sd15: MacCounter) -> None:
    counts = sd15.at((64, 64), text_tokens=77)
    giga(counts.row(RowPlan()), 401.64)
    giga(MacCounter(SD15, attention_matmuls=False).at((64, 64)).row(RowPlan()), 338.61)
    for branch, wanted in enumerate([31.63, 90.07, 152.71]):
        giga(counts.row(RowPlan(reads={level(branch): Reading(Recall())})), wanted)


@pytest.mark.parametrize(
    ("branch", "wanted"),
    [(0, {2: 216.6, 3: 157.4, 5: 105.6, 10: 68.6}), (1, {2: 245.9, 3: 196.0, 5: 152.4, 10: 121.2})],
)
def test_sd15_deepcache_table(branch: int, wanted: dict[int, float]) -> None:
    for interval, average in wanted.items():
        accelerator = DeepCache(interval=interval, branch=branch)
        report = macs(SD15, acceleration=accelerator, num_inference_steps=50, guidance_scale=1.0)
        giga(report.image / 50, average)


@pytest.mark.parametrize(("size", "wanted"), [(256, 118.7), (512, 524.6)])
def test_dit_xl(size: int, wanted: float) -> None:
    giga(macs(DIT_XL, width=size, height=size, num_inference_steps=1, guidance_scale=1.0).row, wanted)


@pytest.mark.parametrize(("depth", "removed"), [(9, 0.391), (8, 0.566)])
def test_depth_skip_drops_the_papers_share_of_parameters(sd15: MacCounter, depth: int, removed: float) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(SD15)
    truncate(unet, depth)
    assert 1 - sum(p.numel() for p in unet.parameters()) / sd15.parameters == pytest.approx(removed, abs=0.001)


def test_depth_skip_at_nine_saves_few_macs() -> None:
    report = macs(SD15, acceleration=DepthSkip(depth=9), num_inference_steps=1)
    assert 1 - report.ratio == pytest.approx(0.059, abs=0.001)


@pytest.mark.parametrize(("steps", "blocks", "speedup"), [(20, 21, 1.60), (4, 6, 1.12)])
def test_delta_dit_block_arithmetic_is_the_papers(steps: int, blocks: int, speedup: float) -> None:
    accelerator = DeltaDiT(interval=2, blocks=blocks, boundary=0)
    report = macs(DIT_XL, acceleration=accelerator, num_inference_steps=steps, guidance_scale=1.0)
    assert 1 / report.ratio == pytest.approx(speedup, rel=0.01)


def test_wrong_configs_and_accelerators_are_refused() -> None:
    with pytest.raises(ModelLoadError, match="AutoencoderKL"):
        macs({"_class_name": "AutoencoderKL"})
    with pytest.raises(WrongBackbone) as refused:
        macs(DIT_XL, acceleration=DeepCache())
    assert refused.value.field == "acceleration.mode"
