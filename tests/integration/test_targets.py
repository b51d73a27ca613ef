"""The picture that a run is heading for, and whether its latents are numbers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models import Backbone, Request, advance, load
from models.generate import start
from models.resolve import resolve
from models.trajectory import Trajectory

Backbones = Callable[..., Backbone]


def begin(backbone: Backbone, scheduler: str, watched: bool = True) -> Trajectory:
    content = {"class_label": 3} if backbone.spec.layout == "dit" else {"prompt": "a ring"}
    wanted = Request(**content, num_inference_steps=5, scheduler=scheduler, guidance_scale=2.0)
    [trajectory] = start(backbone, resolve(backbone.spec, backbone.scheduler_config, wanted))
    trajectory.watched = watched
    return trajectory


@pytest.fixture(scope="module")
def predicting(
    pipeline_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Backbone]:
    """The small U-Net, taken to predict noise, velocity or the clean sample."""
    root = tmp_path_factory.mktemp("predicting")

    def loaded(kind: str) -> Backbone:
        directory = shutil.copytree(pipeline_dir("sd"), root / kind)
        file = directory / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": kind}))
        return load(str(directory), device="cpu", dtype="float64")

    return loaded


def ddim_target(before: Tensor, after: Tensor, now: float, then: float) -> Tensor:
    """The clean latents of a DDIM step: both its ends are signal · clean + noise · eps, at ᾱ `now` and `then`."""
    (s, n), (s2, n2) = ((math.sqrt(a), math.sqrt(1 - a)) for a in (now, then))
    return (n2 * before - n * after) / (n2 * s - n * s2)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_where_a_ddim_step_points(kind: str, predicting: Callable[..., Backbone]) -> None:
    backbone = predicting(kind)
    trajectory = begin(backbone, "ddim")
    assert torch.equal(trajectory.preview(), trajectory.latents)
    alphas = trajectory.scheduler.alphas_cumprod.tolist()
    times = [int(t) for t in trajectory.timesteps]
    assert times[0] > 700
    for i, t in enumerate(times):
        before = trajectory.latents
        advance(backbone, [trajectory])
        then = alphas[times[i + 1]] if i + 1 < len(times) else alphas[0]
        expected = ddim_target(before, trajectory.latents, alphas[t], then)
        assert (trajectory.preview() - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("layout", ["sd", "sd2", "dit"])
def test_where_an_euler_step_points(layout: str, backbone_of: Backbones) -> None:
    """From clean + sigma · noise straight towards clean, scaled before the network sees it; learned variance or not."""
    backbone = backbone_of(layout, torch.float64)
    trajectory = begin(backbone, "euler")
    sigmas = trajectory.scheduler.sigmas.tolist()
    for now, then in pairwise(sigmas):
        before = trajectory.latents
        advance(backbone, [trajectory])
        expected = (now * trajectory.latents - then * before) / (now - then)
        assert (trajectory.preview() - expected).norm() <= 1e-3 * expected.norm()


def test_unwatched_runs_show_their_latents(backbone_of: Backbones) -> None:
    backbone = backbone_of("sd")
    trajectory = begin(backbone, "ddim", watched=False)
    advance(backbone, [trajectory])
    assert torch.equal(trajectory.preview(), trajectory.latents)


def test_watching_changes_nothing(backbone_of: Backbones) -> None:
    backbone = backbone_of("sd")
    watched, unwatched = (begin(backbone, "euler_ancestral", watched) for watched in (True, False))
    while not watched.done:
        for trajectory in (watched, unwatched):
            advance(backbone, [trajectory])
    assert torch.equal(watched.latents, unwatched.latents)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (0, 3, 15, 15), (0, 1, 7, 2)])
def test_one_number_that_is_none_is_seen(value: float, place: tuple[int, ...], backbone_of: Backbones) -> None:
    trajectory = begin(backbone_of("sd"), "ddim")
    assert trajectory.finite()
    trajectory.state = trajectory.state.clone()
    trajectory.state[place] = value
    assert not trajectory.finite()
    trajectory.state = torch.full_like(trajectory.state, value)
    assert not trajectory.finite()
