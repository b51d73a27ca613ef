"""Memory and work of networks of real size, from their configs alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from app.cli import app
from models import Backbone, Request, generate, macs
from models.accelerators import DeltaDiT
from models.costs.memory import Live, known_configs, memory_plan
from models.resolve import resolve
from models.reuse.store import FeatureStore

PUBLISHED = {
    "FLUX.1-dev": 11.9,
    "FLUX.2-klein-4B": 3.9,
    "Z-Image": 6.15,
    "stable-diffusion-3.5-large": 8.06,
    "stable-diffusion-3.5-medium": 2.47,
    "stable-diffusion-v1-5": 0.86,
}
"""Billions of parameters, as the sizes of the published files say (two bytes each)."""


def test_every_known_config_is_held_against_what_is_published() -> None:
    assert known_configs().keys() == PUBLISHED.keys()


@pytest.mark.parametrize(
    "name", ["FLUX.1-dev", "FLUX.2-klein-4B", "Z-Image", "stable-diffusion-3.5-medium", "stable-diffusion-v1-5"]
)
def test_a_plan_of_real_size(name: str) -> None:
    plan = memory_plan(json.loads(known_configs()[name].read_text()), 512, 512, 6)
    assert plan.parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=0.01)
    assert plan.weights == 2 * plan.parameters
    cache = "deepcache" if "deepcache" in plan.features else "delta_dit"
    assert plan.features["none"] == 0 < plan.features["forecast"] < plan.features[cache]
    if cache == "delta_dit":
        assert plan.features["taylorseer"] > plan.features["teacache"] > plan.features["magcache"] > 0
    assert plan.rows(2**30) == 0
    assert plan.rows(2**50) > plan.rows(2**50, plan.features[cache]) > plan.rows(2**49)


def test_macs_of_joint_and_single_blocks_by_hand() -> None:
    """FLUX.1-dev at 512 pixels: 1024 image and 512 text tokens of width 3072."""
    image, text, d = 1024, 512, 3072
    both = image + text
    joint = both * (4 + 8) * d * d + 2 * 6 * d * d + 2 * both * both * d
    single = both * (3 + 4 + 5) * d * d + 3 * d * d + 2 * both * both * d
    times = 2 * (256 * d + d * d) + 768 * d + d * d
    frame = image * 64 * d * 2 + text * 4096 * d + times + 2 * d * d
    config = json.loads(known_configs()["FLUX.1-dev"].read_text())
    plain = 19 * joint + 38 * single + frame
    report = macs(config, width=512, height=512, num_inference_steps=2, acceleration=DeltaDiT(blocks=20, boundary=9))
    assert report.row == plain
    assert report.steps == (plain, plain - 20 * single)
    assert macs(config, width=512, height=512, attention_matmuls=False).row == plain - 57 * 2 * both * both * d


def test_what_lives_at_once_is_counted() -> None:
    x = torch.empty(10, 100, device="meta")
    with Live() as live:
        a = x + 1  # 4000 bytes
        b = a.view(100, 10)
        del a
        c = b * 2  # 8000
        del b, c
        d = x.sum(0)  # 400
        e = d[None].expand(10, 100) + x  # 4400
    assert live.peak == 8000
    del d, e


@pytest.mark.parametrize("layout", ["flux-dev", "sd3.5", "klein-base"])
def test_the_features_of_a_run_are_known_to_the_byte(layout: str, backbone_of: Callable[..., Backbone]) -> None:
    backbone = replace(backbone_of(layout), features=FeatureStore())
    request = Request(prompt="a ring", num_inference_steps=5, acceleration=DeltaDiT(blocks=2, boundary=3, order=1))
    run = resolve(backbone.spec, backbone.scheduler_config, request)
    generate(backbone, [request])
    assert backbone.features.peak_bytes == run.feature_bytes > 0


def test_the_command(tmp_path: Path) -> None:
    def asked(*arguments: str) -> str:
        result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["models", *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    small = {**json.loads(known_configs()["FLUX.2-klein-4B"].read_text()), "num_layers": 1, "num_single_layers": 1}
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(small))
    table = asked("--memory", str(tmp_path), "--size", "256x256")
    assert "rows in 24 GiB" in table
    assert "remembered by an image, forecast" in table
    found = json.loads(asked("--memory", str(tmp_path), "--size", "256x256", "--json"))
    assert found["weights"] == 2 * found["parameters"]
    assert found["rows"]["none"]["48"] > found["rows"]["none"]["24"] > found["rows"]["delta_dit"]["24"]
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({**small, "nosuch": 1}))
    result = CliRunner().invoke(app, ["models", "--memory", str(tmp_path)])
    assert result.exit_code == 2
    assert "nosuch = 1" in result.output
