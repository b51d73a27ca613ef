"""Every accelerator on the transformers over text and image tokens, mixed in one forward: what each does alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import Backbone, Request, advance, generate
from models.accelerators import (
    CfgStudent,
    DeltaDiT,
    DiTFastAttn,
    FirstBlockCache,
    Forecast,
    MagCache,
    SelectiveGuidance,
    TaylorSeer,
    TeaCache,
)
from models.generate import finish, start
from models.networks.window import window_attention
from models.resolve import resolve
from models.reuse.store import FeatureStore
from models.search.attention_plan import Method, Plan
from models.trajectory import Trajectory, decisions
from tests.integration.test_mixed import distance

Backbones = Callable[..., Backbone]
LAYOUTS = ("flux-dev", "sd3.5", "klein-base", "z-image")
STEPS = 7
RATIOS = (1.0, 1.02, 0.99, 1.01, 1.03, 0.97, 1.0)
GUIDED: dict[str, dict[str, Any]] = {
    "flux-dev": {"true_cfg_scale": 2.0, "negative_prompt": "a blue square on white"},
    "sd3.5": {"guidance_scale": 3.0, "negative_prompt": "blue"},
    "klein-base": {"guidance_scale": 3.0},
    "z-image": {"guidance_scale": 2.0, "negative_prompt": "a blue square on a white background"},
}
CHANGE = {"flux-dev": 0.4, "sd3.5": 0.4, "klein-base": 1.0, "z-image": 0.8}
"""Of the first block, between random weights, over which its gate skips some steps and not all."""
TEA = {"flux-dev": 0.2, "sd3.5": 0.2, "klein-base": 0.15, "z-image": 0.4}
"""The same of what enters it, added up."""
UNGUIDED: dict[str, dict[str, Any]] = {"flux-dev": {}, "z-image": {"guidance_scale": 0.0}}


def plan(backbone: Backbone, *methods: Method, window: int = 5) -> DiTFastAttn:
    """Full, then these methods in turns over blocks and steps, for unguided runs of 32 x 32 pixels."""
    blocks = range(backbone.spec.depth)
    table = [["full"] * len(blocks)]
    table += [[(*methods, "full")[(step + block) % (len(methods) + 1)] for block in blocks] for step in range(1, STEPS)]
    return DiTFastAttn(
        plan=Plan.model_validate(
            {
                "model": backbone.spec.name,
                "config_hash": backbone.spec.config_hash,
                "scheduler": "euler",
                "num_inference_steps": STEPS,
                "tokens": backbone.spec.tokens(32, 32),
                "guidance": False,
                "window": window,
                "threshold": 0.1,
                "table": table,
            }
        )
    )


def wishes(layout: str, backbone: Backbone) -> dict[str, dict[str, Any]]:
    """By name, what a request asks for: modes, with other prompts, sizes and guidance in turns."""
    first, tea = CHANGE[layout], {"coefficients": (1.0, 0.0), "threshold": TEA[layout]}
    guided, plain = GUIDED[layout], UNGUIDED.get(layout, {"guidance_scale": 1.0})
    small = {"width": 24, "height": 40}
    return {
        "plain": plain,
        "plain guided": {**guided, **small},
        "forecast": {**plain, "acceleration": Forecast(interval=3, order=2)},
        "delta_dit": {**guided, "acceleration": DeltaDiT(blocks=2, boundary=4, order=1)},
        "taylorseer": {**plain, "acceleration": TaylorSeer(interval=3, warmup=2)},
        "taylorseer guided": {**guided, **small, "acceleration": TaylorSeer(interval=2, order=2, warmup=1)},
        "first_block_cache": {**plain, "acceleration": FirstBlockCache(threshold=first, order=1)},
        "first_block_cache guided": {**guided, "acceleration": FirstBlockCache(threshold=first, max_skips=2)},
        "teacache": {**plain, "acceleration": TeaCache(**tea, order=1)},
        "teacache guided": {**guided, **small, "acceleration": TeaCache(**tea, pair="max")},
        "magcache": {**plain, "acceleration": MagCache(ratios=RATIOS, order=1)},
        "ditfastattn": {**plain, "acceleration": plan(backbone, "ast", "wa-rs")},
        "selective": {**guided, "acceleration": [SelectiveGuidance(stop=0.5), MagCache(ratios=RATIOS)]},
        "student": {"acceleration": [CfgStudent(), TaylorSeer(interval=2, warmup=2)]},
        "foretold": {**plain, "acceleration": [Forecast(interval=2), FirstBlockCache(threshold=first)]},
        "both": {**plain, "acceleration": [DeltaDiT(blocks=1), plan(backbone, "wa-rs")]},
    }


def requests(layout: str, backbone: Backbone) -> dict[str, Request]:
    found = {}
    for i, (name, wish) in enumerate(wishes(layout, backbone).items()):
        common = {"prompt": "a red ring" * (1 + 3 * (i % 2)), "seed": 40 + i, "num_inference_steps": STEPS}
        found[name] = Request(**{**common, "scheduler": "euler", **wish})
    return found


def begin(backbone: Backbone, request: Request) -> Trajectory:
    [trajectory] = start(backbone, resolve(backbone.spec, backbone.scheduler_config, request))
    return trajectory


@pytest.fixture(scope="module")
def alone(student_of: Backbones) -> Callable[[str], dict[str, Trajectory]]:
    """Each run with the backbone for itself."""
    done: dict[str, dict[str, Trajectory]] = {}

    def runs(layout: str) -> dict[str, Trajectory]:
        if layout not in done:
            backbone = student_of(layout, torch.float64)
            done[layout] = {name: begin(backbone, one) for name, one in requests(layout, backbone).items()}
            for trajectory in done[layout].values():
                while not trajectory.done:
                    advance(backbone, [trajectory])
        return done[layout]

    return runs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_alone_equals_mixed(layout: str, student_of: Backbones, alone: Callable[[str], dict[str, Trajectory]]) -> None:
    """Prompts of other lengths, sizes in turns, one arriving at every tick, in float64 but for rotary positions."""
    backbone, singles = student_of(layout, torch.float64), alone(layout)
    waiting = {name: begin(backbone, one) for name, one in requests(layout, backbone).items()}
    running: list[Trajectory] = []
    arriving, turn, widest = list(waiting.values()), 0, 0
    while arriving or running:
        running += [arriving.pop(0) for _ in range(min(2, len(arriving)))]
        groups = list(dict.fromkeys(t.group for t in running))
        together = [t for t in running if t.group == groups[turn % len(groups)]]
        widest = max(widest, len(together))
        advance(backbone, together)
        running = [t for t in running if not t.done]
        turn += 1
    assert widest >= 4
    for name, mixed in waiting.items():
        assert distance(mixed.latents, singles[name].latents) <= 1e-6, name
        assert mixed.ran == singles[name].ran, name
        assert mixed.memory_bytes() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_mode_changes_the_picture_and_gates_do_both(
    layout: str, student_of: Backbones, alone: Callable[[str], dict[str, Trajectory]]
) -> None:
    backbone, asked = student_of(layout, torch.float64), requests(layout, student_of(layout, torch.float64))
    for name, run in alone(layout).items():
        if run.ran and name != "foretold":  # which asks a gate three times
            assert min(decisions(run).values()) >= 1, (name, decisions(run))
        plain = replace(asked[name], acceleration=(), guidance_scale=asked[name].guidance_scale)
        [without] = generate(backbone, [plain])
        assert (distance(run.latents, without.latents) > 1e-4) == (not name.startswith("plain")), name


TOLD = [
    ("flux-dev", "taylorseer"),
    ("flux-dev", "ditfastattn"),
    ("sd3.5", "taylorseer guided"),
    ("sd3.5", "teacache"),
    ("klein-base", "taylorseer"),
    ("z-image", "taylorseer guided"),
    ("z-image", "ditfastattn"),
]


@pytest.mark.parametrize(("layout", "name"), TOLD)
def test_features_and_work_are_what_was_told(layout: str, name: str, student_of: Backbones) -> None:
    """Bytes before a run begins, MACs where it ended."""
    backbone = replace(student_of(layout), features=FeatureStore())
    request = requests(layout, backbone)[name]
    run = resolve(backbone.spec, backbone.scheduler_config, replace(request, prompt="a red ring" * 12))
    trajectories = start(backbone, run)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        while not trajectories[0].done:
            advance(backbone, trajectories)
    usage = finish(backbone, run, trajectories).usage
    assert usage.macs == pytest.approx(counter.get_total_flops() // 2, rel=0.01)
    assert usage.macs < 0.999 * usage.macs_unaccelerated
    assert 0 < backbone.features.peak_bytes <= run.feature_bytes
    if name != "teacache":
        assert backbone.features.peak_bytes == run.feature_bytes


@pytest.mark.parametrize("text", [(0, 7), (40, 47)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_band_under_text_is_what_a_mask_gives(text: tuple[int, int], masked: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, 47, 8, dtype=torch.float64) for _ in range(3))
    start, stop = text
    image = torch.tensor([i for i in range(47) if not start <= i < stop])
    allowed = torch.ones(47, 47, dtype=torch.bool)
    allowed[image[:, None], image[None]] = (image[:, None] - image[None]).abs() <= 6
    counts = torch.ones(3, 1, 1, 47, dtype=torch.bool)
    if masked:
        counts[1, ..., stop - 3 : stop] = False
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed & counts)
    ours = window_attention(query, key, value, 6, text, counts if masked else None)
    assert torch.allclose(ours, expected, atol=1e-12)
    whole = F.scaled_dot_product_attention(query, key, value)
    assert not torch.allclose(ours, whole, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_band_as_wide_as_the_image_is_full_attention(layout: str, student_of: Backbones) -> None:
    backbone = student_of(layout, torch.float64)
    wide = replace(requests(layout, backbone)["ditfastattn"], acceleration=plan(backbone, "wa-rs", window=1000))
    plain = replace(wide, acceleration=())
    ours, theirs = (one.latents for one in generate(backbone, [wide, plain]))
    assert distance(ours, theirs) <= 1e-6
