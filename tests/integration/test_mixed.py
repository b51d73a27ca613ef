"""Alone or mixed, before or after anything else: a request gives the same picture, and leaves nothing behind."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations_with_replacement, count
from typing import Any

import pytest
import torch
from torch import Tensor

from models import Backbone, Plan, Request, advance, generate
from models.accelerators import (
    CfgStudent,
    DeepCache,
    DeltaDiT,
    DepthSkip,
    DiTFastAttn,
    Forecast,
    MagCache,
    SelectiveGuidance,
    TaylorSeer,
)
from models.denoise import predict
from models.generate import start
from models.resolve import resolve
from models.search.attention_plan import METHODS
from models.trajectory import Trajectory

Backbones = Callable[..., Backbone]


def attention(backbone: Backbone, seed: int, scheduler: str, steps: int, *, guided: bool, window: int) -> DiTFastAttn:
    """A random plan."""
    choices = [method for method in METHODS if guided or "asc" not in method]
    pick, blocks = random.Random(seed), backbone.spec.depth
    rows = [tuple(pick.choice(choices) for _ in range(blocks)) for _ in range(steps - 1)]
    plan = Plan(
        model="small",
        config_hash=backbone.spec.config_hash,
        scheduler=scheduler,
        num_inference_steps=steps,
        tokens=64,
        guidance=guided,
        window=window,
        threshold=0.1,
        table=(("full",) * blocks, *rows),
    )
    return DiTFastAttn(plan=plan)


UNET_CASES: dict[str, Callable[[Backbone], dict[str, Any]]] = {
    "none": lambda _: {"scheduler": "ddim", "num_inference_steps": 5},
    "unguided": lambda _: {"scheduler": "euler_ancestral", "num_inference_steps": 4, "guidance_scale": 1.0},
    "deepcache": lambda _: {"acceleration": DeepCache(interval=3), "scheduler": "euler", "num_inference_steps": 6},
    "nonuniform": lambda _: {
        "acceleration": DeepCache(interval=2, branch=4, schedule="nonuniform", center=2),
        "scheduler": "heun",
        "num_inference_steps": 3,
        "guidance_scale": 6.0,
    },
    "depth_skip": lambda _: {"acceleration": DepthSkip(depth=4), "scheduler": "pndm", "num_inference_steps": 4},
    "forecast": lambda _: {
        "acceleration": [Forecast(interval=3, order=2, warmup=2), SelectiveGuidance(stop=0.7)],
        "scheduler": "unipc",
        "num_inference_steps": 9,
    },
    "student": lambda _: {
        "acceleration": [CfgStudent(), DeepCache(interval=2, branch=6, order=1)],
        "scheduler": "dpmpp_2m_karras",
        "num_inference_steps": 5,
        "guidance_scale": None,
    },
    "selective": lambda _: {
        "acceleration": [SelectiveGuidance(start=0.2, stop=0.6), DeepCache(interval=2, branch=2)],
        "scheduler": "lcm",
        "num_inference_steps": 6,
        "guidance_scale": 2.0,
    },
}
DIT_CASES: dict[str, Callable[[Backbone], dict[str, Any]]] = {
    "none": lambda _: {"scheduler": "ddim", "num_inference_steps": 5},
    "delta_dit": lambda _: {
        "acceleration": DeltaDiT(interval=2, blocks=4, boundary=3),
        "scheduler": "heun",
        "num_inference_steps": 4,
    },
    "ditfastattn": lambda b: {
        "acceleration": attention(b, 1, "euler", 5, guided=True, window=5),
        "scheduler": "euler",
        "num_inference_steps": 5,
    },
    "unguided": lambda b: {
        "acceleration": attention(b, 2, "unipc", 6, guided=False, window=20),
        "scheduler": "unipc",
        "num_inference_steps": 6,
        "guidance_scale": 1.0,
    },
    "both": lambda b: {
        "acceleration": [attention(b, 3, "dpmpp_2m", 5, guided=True, window=5), DeltaDiT(interval=2, blocks=2)],
        "scheduler": "dpmpp_2m",
        "num_inference_steps": 5,
        "guidance_scale": 6.0,
    },
    "forecast": lambda b: {
        "acceleration": [Forecast(evaluations=4, basis="taylor", order=2), DeltaDiT(interval=2, blocks=3, order=1)],
        "scheduler": "dpmpp_2m",
        "num_inference_steps": 8,
    },
    "magcache": lambda b: {
        "acceleration": [MagCache(ratios=(1.0, 1.01), order=1), attention(b, 5, "euler", 7, guided=True, window=5)],
        "scheduler": "euler",
        "num_inference_steps": 7,
    },
    "taylorseer": lambda _: {
        "acceleration": [TaylorSeer(interval=3, order=2, warmup=2), SelectiveGuidance(start=0.2)],
        "scheduler": "ddim",
        "num_inference_steps": 9,
    },
    "taylorseer_student": lambda _: {
        "acceleration": [CfgStudent(), TaylorSeer(interval=2, warmup=1, basis="hermite")],
        "scheduler": "dpmpp_2m",
        "num_inference_steps": 6,
        "guidance_scale": None,
    },
    "student": lambda _: {
        "acceleration": [CfgStudent(), DeltaDiT(interval=3, blocks=3, boundary=2)],
        "scheduler": "lcm",
        "num_inference_steps": 4,
        "guidance_scale": None,
    },
    "selective": lambda b: {
        "acceleration": [SelectiveGuidance(start=0.2, stop=0.6), attention(b, 4, "ddim", 6, guided=True, window=9)],
        "scheduler": "ddim",
        "num_inference_steps": 6,
        "guidance_scale": 2.0,
    },
}
CASES = {"sd": UNET_CASES, "pixart-sigma": DIT_CASES, "dit": DIT_CASES}
PAIRED = ("sd", "pixart-sigma")
PAIRS = [(layout, *pair) for layout in PAIRED for pair in combinations_with_replacement(CASES[layout], 2)]


def request(layout: str, name: str, backbone: Backbone, **options: Any) -> Request:
    seed = list(CASES[layout]).index(name)
    text = {"prompt": f"picture {seed}", "negative_prompt": None}
    content = {"class_label": seed} if layout == "dit" else text
    return Request(**{**content, "guidance_scale": 3.0, "seed": seed, **CASES[layout][name](backbone), **options})


def plain(layout: str, name: str, backbone: Backbone) -> Request:
    """The same request without accelerators."""
    original = request(layout, name, backbone)
    return replace(original, acceleration=(), guidance_scale=original.guidance_scale or 3.0)


def begin(backbone: Backbone, wanted: Request) -> Trajectory:
    [trajectory] = start(backbone, resolve(backbone.spec, backbone.scheduler_config, wanted))
    return trajectory


def run(backbone: Backbone, requests: Sequence[Request], stagger: int = 0) -> list[Tensor]:
    """Final latents; request i joins at tick i * stagger."""
    trajectories = [begin(backbone, wanted) for wanted in requests]
    for tick in count():
        active = [t for i, t in enumerate(trajectories) if tick >= i * stagger and not t.done]
        if not active:
            break
        advance(backbone, active)
        for trajectory in active:
            check_memory(trajectory)
    return [t.latents for t in trajectories]


def check_memory(trajectory: Trajectory) -> None:
    """Nothing is remembered once the run is done."""
    if trajectory.done:
        assert trajectory.memory_bytes() == 0


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def alone(student_of: Backbones) -> Callable[[str, str, torch.dtype], Tensor]:
    """The latents of a case that had the backbone for itself."""
    done: dict[tuple[str, str, torch.dtype], Tensor] = {}

    def latents(layout: str, name: str, dtype: torch.dtype) -> Tensor:
        key = (layout, name, dtype)
        if key not in done:
            backbone = student_of(layout, dtype)
            [done[key]] = run(backbone, [request(layout, name, backbone)])
        return done[key]

    return latents


@pytest.fixture(scope="module")
def plain_noise(student_of: Backbones) -> Callable[[str], float]:
    """What sharing a batch does in fp32 to two plain requests: the largest distance over the schedulers of a layout."""
    done: dict[str, float] = {}

    def measured(layout: str) -> float:
        if layout not in done:
            backbone = student_of(layout)
            requests = [plain(layout, name, backbone) for name in CASES[layout]]
            singles = [run(backbone, [wanted])[0] for wanted in requests]
            pairs = [run(backbone, [wanted, requests[0]])[0] for wanted in requests]
            done[layout] = max(distance(*both) for both in zip(pairs, singles, strict=True))
        return done[layout]

    return measured


@pytest.mark.parametrize(("layout", "first", "second"), PAIRS)
def test_alone_equals_mixed(
    layout: str, first: str, second: str, student_of: Backbones, alone: Callable[..., Tensor]
) -> None:
    """Every pair in one batch, the second joining two steps later; other steps, scheduler and scale."""
    backbone = student_of(layout, torch.float64)
    requests = [request(layout, name, backbone) for name in (first, second)]
    for name, mixed in zip((first, second), run(backbone, requests, stagger=2), strict=True):
        assert distance(mixed, alone(layout, name, torch.float64)) <= 1e-10


@pytest.mark.parametrize("stagger", [0, 1, 2])
@pytest.mark.parametrize("layout", CASES)
def test_all_cases_in_one_batch(layout: str, stagger: int, student_of: Backbones, alone: Callable[..., Tensor]) -> None:
    backbone = student_of(layout, torch.float64)
    names = random.Random(stagger).sample(list(CASES[layout]), len(CASES[layout]))
    results = run(backbone, [request(layout, name, backbone) for name in names], stagger)
    for name, mixed in zip(names, results, strict=True):
        assert distance(mixed, alone(layout, name, torch.float64)) <= 1e-10


@pytest.mark.parametrize("layout", PAIRED)
def test_in_single_precision_mixing_is_no_worse_than_for_plain_requests(
    layout: str, student_of: Backbones, alone: Callable[..., Tensor], plain_noise: Callable[[str], float]
) -> None:
    backbone = student_of(layout)
    for first, second in combinations_with_replacement(CASES[layout], 2):
        results = run(backbone, [request(layout, name, backbone) for name in (first, second)], stagger=2)
        for name, mixed in zip((first, second), results, strict=True):
            assert distance(mixed, alone(layout, name, torch.float32)) <= 5 * plain_noise(layout), (first, second)


class Failing:
    """A network that raises at its n-th forward."""

    def __init__(self, network: Any, at: int) -> None:
        self._network = network
        self._left = at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def forward(self, *args: Any) -> Tensor:
        result: Tensor = self._network.forward(*args)
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("broken on purpose")
        return result


@pytest.mark.parametrize(
    ("layout", "name"), [("sd", "deepcache"), ("sd", "student"), ("pixart-sigma", "both"), ("dit", "ditfastattn")]
)
def test_before_and_after_anything_else(layout: str, name: str, student_of: Backbones) -> None:
    backbone = student_of(layout)
    wanted = request(layout, name, backbone)
    [before] = generate(backbone, [wanted])
    generate(backbone, [request(layout, other, backbone, seed=99) for other in CASES[layout]])

    aborted = begin(backbone, request(layout, name, backbone, seed=5))
    advance(backbone, [aborted])
    assert backbone.features.nbytes == aborted.memory_bytes() > 0
    del aborted
    gc.collect()
    assert backbone.features.nbytes == 0

    with pytest.raises(RuntimeError, match="broken on purpose"):
        generate(replace(backbone, network=Failing(backbone.network, at=2)), [request(layout, name, backbone, seed=6)])
    [after] = generate(backbone, [wanted])
    assert torch.equal(before.latents, after.latents)


@pytest.mark.parametrize("layout", CASES)
def test_a_failed_tick_can_be_tried_again(layout: str, student_of: Backbones, alone: Callable[..., Tensor]) -> None:
    """Whichever forward fails, the trajectories stand where they stood."""
    backbone = student_of(layout, torch.float64)
    for name in CASES[layout]:
        trajectory = begin(backbone, request(layout, name, backbone))
        while not trajectory.done:
            step, latents = trajectory.step, trajectory.latents
            with pytest.raises(RuntimeError, match="broken on purpose"):
                advance(replace(backbone, network=Failing(backbone.network, at=0)), [trajectory])
            assert trajectory.step == step
            assert trajectory.latents is latents
            advance(backbone, [trajectory])
        assert torch.equal(trajectory.latents, alone(layout, name, torch.float64))


def test_memory_is_what_the_plan_says(backbone_of: Backbones) -> None:
    """DeepCache, N = 3: one hidden state a row, given back by the last step that reads it."""
    backbone = backbone_of("sd")
    trajectory = begin(backbone, request("sd", "deepcache", backbone))
    pair = 2 * 16 * 16 * 16 * 4  # two rows of 16 channels, 16 x 16, in fp32
    held = []
    while not trajectory.done:
        advance(backbone, [trajectory])
        held.append(trajectory.memory_bytes())
    assert held == [pair, pair, 0] * 2


def test_other_sizes_take_turns(backbone_of: Backbones, alone: Callable[..., Tensor]) -> None:
    backbone = backbone_of("sd")
    small, large = (request("sd", "deepcache", backbone, width=side, height=32) for side in (32, 48))
    results = generate(backbone, [small, large, small])
    assert torch.equal(results[1].latents, generate(backbone, [large])[0].latents)
    assert [r.images[0].size for r in results] == [(32, 32), (48, 32), (32, 32)]


def test_few_rows_a_tick(student_of: Backbones, alone: Callable[..., Tensor]) -> None:
    """With room for one pair a forward every request has the backbone for itself, in turn."""
    backbone = student_of("sd")
    names = [name for name in UNET_CASES if name != "unguided"]
    results = generate(backbone, [request("sd", name, backbone) for name in names], max_rows=2)
    for name, result in zip(names, results, strict=True):
        assert distance(result.latents, alone("sd", name, torch.float32)) <= 1e-5


@pytest.mark.parametrize("layout", CASES)
def test_the_peak_of_memory_is_known_before_the_start(layout: str, student_of: Backbones) -> None:
    """To the byte, alone and all together; and nothing is held afterwards."""
    backbone = student_of(layout)
    runs = [resolve(backbone.spec, backbone.scheduler_config, request(layout, n, backbone)) for n in CASES[layout]]
    for run in runs:
        backbone.features.peak_bytes = 0
        [trajectory] = start(backbone, run)
        while not trajectory.done:
            advance(backbone, [trajectory])
        assert backbone.features.peak_bytes == run.feature_bytes
        assert backbone.features.nbytes == backbone.features.reserved_bytes == 0
    assert any(run.feature_bytes for run in runs)


@pytest.mark.parametrize(("layout", "name"), [("sd", "deepcache"), ("dit", "delta_dit"), ("pixart-sigma", "both")])
def test_rows_are_answered_in_the_order_given(layout: str, name: str, student_of: Backbones) -> None:
    """However a network sorts them: reduced rows between full ones, conditional and unconditional in turns."""
    backbone = student_of(layout, torch.float64)
    trajectories = [begin(backbone, request(layout, n, backbone)) for n in (name, "none", name, "none", name)]
    for i, trajectory in enumerate(trajectories):
        for _ in range(i):
            advance(backbone, [trajectory])
    rows = [(row, trajectory) for trajectory in trajectories for row in trajectory.rows()]
    alone = {t: predict(backbone, [(row, t) for row in t.rows()])[t] for t in trajectories}
    random.Random(0).shuffle(rows)
    together = predict(backbone, rows)
    assert together.keys() == alone.keys()
    for trajectory, predictions in together.items():
        assert predictions.keys() == alone[trajectory].keys() == set(backbone.roles)
        for role, prediction in predictions.items():
            assert distance(prediction, alone[trajectory][role]) <= 1e-10
