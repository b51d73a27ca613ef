"""Caches of whole runs of blocks: what diffusers' own hooks and plain loops do, and beside every other mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_mag_cache,
    apply_taylorseer_cache,
)
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor

from models import Backbone, advance
from models.accelerators import (
    AdaptiveDeepCache,
    CfgStudent,
    FirstBlockCache,
    Forecast,
    MagCache,
    SelectiveGuidance,
    TaylorSeer,
    TeaCache,
)
from models.accelerators.base import Accelerator
from models.denoise import Tick
from models.trajectory import Trajectory, decisions
from tests.integration import test_mixed
from tests.integration.test_gates import denoised, request, skipped
from tests.integration.test_mixed import begin, distance, run
from tests.reference import by_loop, generators, text_conditioning

Backbones = Callable[..., Backbone]
STEPS = 9
APPLY: dict[type, Any] = {
    FirstBlockCacheConfig: apply_first_block_cache,
    MagCacheConfig: apply_mag_cache,
    TaylorSeerCacheConfig: apply_taylorseer_cache,
}
RATIOS = (1.0, 1.2, 0.9, 1.004, 1.03, 0.97, 1.01, 0.99, 1.02)


def predictions(backbone: Backbone, acceleration: Accelerator, guided: bool) -> tuple[list[Tensor], Trajectory]:
    """Each step's predictions [rows, channels, h, w], and the run."""
    options = {"guidance_scale": 3.0 if guided else 1.0, "num_inference_steps": STEPS}
    trajectory = begin(backbone, request(backbone, acceleration, **options))
    seen = []
    while not trajectory.done:
        tick = Tick(backbone, [trajectory], [(row, trajectory) for row in trajectory.rows()])
        seen.append(tick.forward().clone())
        tick.step(seen[-1])
    return seen, trajectory


def reference(pipeline: Any, hook: Any, guided: bool) -> tuple[list[Tensor], Tensor]:
    """The same of diffusers' transformer under one of its caches, and the final latents."""
    seen: list[Tensor] = []
    if hook is not None:
        APPLY[type(hook)](pipeline.transformer, hook)
    pipeline.transformer.register_forward_hook(lambda module, args, out: seen.append(out.sample.clone()))
    if hasattr(pipeline, "text_encoder"):
        rows = text_conditioning(pipeline, "a red ring", "", guided)
    else:
        rows = [{"class_labels": torch.tensor([label])} for label in ((3, 1000) if guided else (3,))]
    with CacheMixin.cache_context(pipeline.transformer, "pair"):
        drawn = by_loop(pipeline, "ddim", rows, steps=STEPS, scale=3.0, seeds=generators(1, 1))
    return seen, drawn.latents


HOOKS: dict[str, Callable[[], tuple[Any, Accelerator]]] = {
    "first_block_low": lambda: (FirstBlockCacheConfig(threshold=0.06), FirstBlockCache(threshold=0.06)),
    "first_block_high": lambda: (FirstBlockCacheConfig(threshold=0.15), FirstBlockCache(threshold=0.15)),
    "magcache": lambda: (
        MagCacheConfig(mag_ratios=list(RATIOS), num_inference_steps=STEPS),
        MagCache(ratios=RATIOS),
    ),
    "magcache_stretched": lambda: (
        MagCacheConfig(
            mag_ratios=[1.0, 1.03, 0.9, 1.01],
            num_inference_steps=STEPS,
            threshold=0.2,
            max_skip_steps=2,
            retention_ratio=0.3,
        ),
        MagCache(ratios=(1.0, 1.03, 0.9, 1.01), threshold=0.2, max_skips=2, retention=0.3),
    ),
}


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("layout", ["pixart-alpha", "dit"])
@pytest.mark.parametrize(("interval", "order", "warmup"), [(3, 2, 2), (2, 1, 1), (4, 3, 3)])
def test_taylorseer_equals_diffusers_hook_step_by_step(
    interval: int,
    order: int,
    warmup: int,
    layout: str,
    guided: bool,
    backbone_of: Backbones,
    pipeline_of: Callable[..., Any],
) -> None:
    """Told the modules by name: by default diffusers takes only what is called `attn`, which neither network has."""
    pipeline = copy.deepcopy(pipeline_of(layout, torch.float64))
    hook = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=warmup,
        max_order=order,
        taylor_factors_dtype=torch.float64,
        cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|attn2|ff)"],
    )
    ran: list[int] = []
    pipeline.transformer.transformer_blocks[2].ff.net[0].register_forward_hook(lambda *_: ran.append(1))
    expected, latents = reference(pipeline, hook, guided)
    cache = TaylorSeer(interval=interval, order=order, warmup=warmup)
    found, trajectory = predictions(backbone_of(layout, torch.float64), cache, guided)
    assert STEPS - len(skipped(trajectory)) == len(ran) == warmup + len(range(warmup + 1, STEPS, interval))
    for step in range(STEPS):
        channels = found[step].shape[1]
        assert distance(found[step], expected[step][:, :channels]) <= 1e-12, step
    assert distance(trajectory.latents, latents) <= 1e-12


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("layout", ["pixart-alpha", "pixart-sigma"])
@pytest.mark.parametrize("name", HOOKS)
def test_equals_diffusers_hook_step_by_step(
    name: str, layout: str, guided: bool, backbone_of: Backbones, pipeline_of: Callable[..., Any]
) -> None:
    """Over a batch of one pair, or one row, in float64."""
    hook, ours = HOOKS[name]()
    pipeline = copy.deepcopy(pipeline_of(layout, torch.float64))
    expected, latents = reference(pipeline, hook, guided)
    found, trajectory = predictions(backbone_of(layout, torch.float64), ours, guided)
    assert len(found) == len(expected) == STEPS
    assert 0 < len(skipped(trajectory)) < STEPS - 1
    for step in range(STEPS):
        channels = found[step].shape[1]
        assert torch.equal(found[step], expected[step][:, :channels]), step
    assert torch.equal(trajectory.latents, latents)


class ByHand:
    """TeaCache on diffusers' blocks, by a pre-hook on the first and a hook on the last: nothing is saved, but what is
    computed and not wanted is thrown away."""

    def __init__(self, transformer: Any, threshold: float, coefficients: tuple[float, ...], largest: bool) -> None:
        self._threshold, self._coefficients, self._largest = threshold, coefficients, largest
        self._seen: Tensor | None = None
        self._input = self._effect = torch.empty(0)
        self._sum = 0.0
        self._skip = False
        self.step = 0
        self.skipped: list[int] = []
        transformer.transformer_blocks[0].register_forward_pre_hook(self._enter)
        transformer.transformer_blocks[0].attn1.register_forward_pre_hook(self._decide)
        transformer.transformer_blocks[-1].register_forward_hook(self._leave)

    def _enter(self, _: Any, inputs: tuple[Tensor, ...]) -> None:
        self._input = inputs[0]

    def _decide(self, _: Any, inputs: tuple[Tensor, ...]) -> None:
        now, before = inputs[0].clone(), self._seen
        self._seen = now
        if before is None or self.step == STEPS - 1:
            self._skip, self._sum = False, 0.0
            return
        if self._largest:
            change = max(float((a - b).abs().mean() / b.abs().mean()) for a, b in zip(now, before, strict=True))
        else:
            change = float((now - before).abs().mean() / before.abs().mean())
        self._sum += sum(c * change**i for i, c in enumerate(reversed(self._coefficients)))
        self._skip = self._sum < self._threshold
        if not self._skip:
            self._sum = 0.0

    def _leave(self, _: Any, inputs: tuple[Any, ...], out: Tensor) -> Tensor:
        if self._skip:
            self.skipped.append(self.step)
            out = self._input + self._effect
        else:
            self._effect = out - self._input
        self.step += 1
        return out


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("pair", ["mean", "max"])
@pytest.mark.parametrize("threshold", [0.2, 0.5])
def test_teacache_equals_a_loop_by_hand(
    threshold: float, pair: Any, guided: bool, backbone_of: Backbones, pipeline_of: Callable[..., Any]
) -> None:
    """No skip in the first and the last step; changes from step to step, through a polynomial, summed."""
    coefficients = (2.0, 0.8, 0.01)
    pipeline = copy.deepcopy(pipeline_of("pixart-sigma", torch.float64))
    hand = ByHand(pipeline.transformer, threshold, coefficients, pair == "max")
    _, latents = reference(pipeline, None, guided)
    cache = TeaCache(threshold=threshold, coefficients=coefficients, pair=pair)
    _, ours = predictions(backbone_of("pixart-sigma", torch.float64), cache, guided)
    assert skipped(ours) == hand.skipped
    assert 0 < len(hand.skipped) < STEPS - 2
    assert torch.equal(ours.latents, latents)


MODES: dict[str, dict[str, list[Accelerator]]] = {
    "sd": {
        "adaptive": [AdaptiveDeepCache(threshold=0.25)],
        "deeper": [AdaptiveDeepCache(threshold=0.3, branch=4, order=2, max_skips=2), SelectiveGuidance(stop=0.6)],
        "student": [CfgStudent(), AdaptiveDeepCache(threshold=0.25, branch=1, order=1)],
        "foretold": [Forecast(interval=2), AdaptiveDeepCache(threshold=0.8, branch=2)],
    },
    "pixart-sigma": {
        "first": [FirstBlockCache(threshold=0.1)],
        "first_order": [FirstBlockCache(threshold=0.06, order=2, pair="max", warmup=3), SelectiveGuidance(start=0.3)],
        "tea": [TeaCache(threshold=0.4, coefficients=(1.0, 0.0), max_skips=2)],
        "student": [CfgStudent(), TeaCache(threshold=0.4, coefficients=(0.5, 1.0, 0.0), order=1)],
    },
}
NAMES = [(layout, mode) for layout in MODES for mode in MODES[layout]]


def wanted(backbone: Backbone, layout: str, mode: str) -> Any:
    index = list(MODES[layout]).index(mode)
    options: dict[str, Any] = {"seed": index, "prompt": f"picture {index}", "num_inference_steps": 7 + index % 2}
    options |= {"scheduler": ("ddim", "dpmpp_2m")[index % 2], "guidance_scale": None if mode == "student" else 3.0}
    return request(backbone, *MODES[layout][mode], **options)


@pytest.fixture(scope="module")
def alone(student_of: Backbones) -> Callable[[str, str], Trajectory]:
    """A mode that had the backbone for itself."""
    done: dict[tuple[str, str], Trajectory] = {}

    def trajectory(layout: str, mode: str) -> Trajectory:
        if (layout, mode) not in done:
            backbone = student_of(layout, torch.float64)
            done[layout, mode] = denoised(backbone, wanted(backbone, layout, mode))
        return done[layout, mode]

    return trajectory


@pytest.fixture(scope="module")
def others(student_of: Backbones) -> Callable[[str, str], Tensor]:
    """The latents of an old mode that had the backbone for itself."""
    done: dict[tuple[str, str], Tensor] = {}

    def latents(layout: str, name: str) -> Tensor:
        if (layout, name) not in done:
            backbone = student_of(layout, torch.float64)
            [done[layout, name]] = run(backbone, [test_mixed.request(layout, name, backbone)])
        return done[layout, name]

    return latents


@pytest.mark.parametrize(("layout", "mode"), NAMES)
def test_alone_equals_mixed_with_every_old_mode(
    layout: str, mode: str, student_of: Backbones, alone: Any, others: Any
) -> None:
    """In one batch, which the cache joins in the middle."""
    backbone, old = student_of(layout, torch.float64), list(test_mixed.CASES[layout])
    requests = [test_mixed.request(layout, name, backbone) for name in old]
    requests.insert(3, wanted(backbone, layout, mode))
    results = run(backbone, requests, stagger=1)
    assert distance(results.pop(3), alone(layout, mode).latents) <= 1e-10
    for name, latents in zip(old, results, strict=True):
        assert distance(latents, others(layout, name)) <= 1e-10, name


@pytest.mark.parametrize("layout", MODES)
def test_all_in_one_batch(layout: str, student_of: Backbones, alone: Any) -> None:
    backbone = student_of(layout, torch.float64)
    names = [*MODES[layout]]
    results = run(backbone, [wanted(backbone, layout, name) for name in names] * 2, stagger=1)
    for name, latents in zip(names * 2, results, strict=True):
        assert distance(latents, alone(layout, name).latents) <= 1e-10, name
    assert backbone.features.nbytes == 0


@pytest.mark.parametrize(("layout", "mode"), NAMES)
def test_the_modes_skip_and_compute(layout: str, mode: str, alone: Any) -> None:
    made = decisions(alone(layout, mode))
    assert made["skipped"] >= 1
    assert made["computed"] >= 1


@pytest.mark.parametrize(("layout", "mode"), [("sd", "adaptive"), ("pixart-sigma", "first"), ("pixart-sigma", "tea")])
def test_a_skipped_step_does_not_run_the_blocks(layout: str, mode: str, student_of: Backbones) -> None:
    """As often as steps were computed, and no more."""
    backbone = student_of(layout, torch.float64)
    module: Any = backbone.network.module
    inner = module.mid_block.resnets[0] if layout == "sd" else module.transformer_blocks[-1]
    rows: list[int] = []
    handle = inner.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    trajectory = begin(backbone, wanted(backbone, layout, mode))
    while not trajectory.done:
        advance(backbone, [trajectory])
    handle.remove()
    assert rows == [2] * (trajectory.num_steps - len(skipped(trajectory)))
    assert 0 < len(skipped(trajectory)) < trajectory.num_steps
