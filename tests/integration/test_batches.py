"""Alone = mixed where rows are easily mixed up: texts of several lengths, adapters between base rows, twins, windows.

In float64, so that what is left is a mix-up and not noise. And who shares a forward with whom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from models import Backbone, Request, advance, generate
from models.accelerators import CfgStudent, DeepCache, DeltaDiT, DepthSkip, SelectiveGuidance
from models.generate import start
from models.resolve import resolve
from models.trajectory import Trajectory
from tests.integration.test_attention_sharing import attention_plan, reference
from tests.integration.test_full_steps import plan

Backbones = Callable[..., Backbone]
Pipelines = Callable[..., Any]


def latents_of(backbone: Backbone, requests: Sequence[Request], joins: Sequence[int]) -> list[Tensor]:
    """Final latents of every request's first image; request i joins at tick joins[i]."""
    trajectories: list[Trajectory] = []
    for wanted in requests:
        trajectories += start(backbone, resolve(backbone.spec, backbone.scheduler_config, wanted))
    for tick in count():
        active = [t for t, join in zip(trajectories, joins, strict=True) if tick >= join and not t.done]
        if active:
            advance(backbone, active)
        elif all(t.done for t in trajectories):
            break
    return [t.latents for t in trajectories]


def check(backbone: Backbone, requests: Sequence[Request], joins: Sequence[int] | None = None) -> None:
    """Each alone, all together, and all together the other way round: the same latents, and no two alike."""
    assert backbone.dtype == torch.float64
    joins = joins or [0] * len(requests)
    alone = [latents_of(backbone, [wanted], [0])[0] for wanted in requests]
    together = latents_of(backbone, requests, joins)
    backwards = latents_of(backbone, requests[::-1], joins[::-1])[::-1]
    for single, mixed, reverse in zip(alone, together, backwards, strict=True):
        assert (mixed - single).norm() <= 1e-10 * single.norm()
        assert (reverse - single).norm() <= 1e-10 * single.norm()
    assert all((a - b).norm() > 1e-3 * b.norm() for i, a in enumerate(alone) for b in alone[:i])


def wanted(backbone: Backbone, seed: int, *accelerators: Any, **options: Any) -> Request:
    """A request of a text (or class) of its own."""
    words = ["ring", "red", "above", "blue", "square", "white"][: 1 + seed % 6]
    content: dict[str, Any] = {"prompt": "a " + " ".join(words), "negative_prompt": "dull " * (seed % 4)}
    if backbone.spec.layout == "dit":
        content = {"class_label": 17 * seed}
    if any(isinstance(a, CfgStudent) for a in accelerators):
        content.pop("negative_prompt", None)
    elif "guidance_scale" not in options:
        content["guidance_scale"] = 2.0 + seed
    return Request(
        **{"num_inference_steps": 4, "seed": seed, "scheduler": "ddim", **content, **options},
        acceleration=accelerators,
    )


@pytest.mark.parametrize("layout", ["sd", "sd2", "sdxl", "pixart-alpha", "dit"])
def test_texts_seeds_scales_and_sharpness(layout: str, backbone_of: Backbones) -> None:
    """Five plain requests that differ in all that they may, one unguided and one of more steps."""
    backbone = backbone_of(layout, torch.float64)
    requests = [wanted(backbone, seed) for seed in range(3)]
    requests.append(wanted(backbone, 3, guidance_scale=1.0))
    requests.append(wanted(backbone, 4, num_inference_steps=6, scheduler="euler"))
    check(backbone, requests, [0, 1, 0, 2, 1])


@pytest.mark.parametrize("layout", ["sd", "sdxl"])
def test_students_between_base_rows(layout: str, student_of: Backbones) -> None:
    """Sorted by depth, rows under one adapter stand on both sides of base rows."""
    backbone = student_of(layout, torch.float64)
    cached, student = DeepCache(interval=2, branch=2), CfgStudent()
    requests = [
        wanted(backbone, 1, guidance_scale=1.0),
        wanted(backbone, 2, student, cached),
        wanted(backbone, 3, cached),
        wanted(backbone, 4, student, cached),
        wanted(backbone, 5, student),
        wanted(backbone, 6, cached, guidance_scale=1.0),
    ]
    check(backbone, requests, [0, 0, 1, 1, 0, 0])


@pytest.mark.parametrize("layout", ["pixart-sigma", "dit"])
def test_students_between_base_rows_of_a_transformer(layout: str, student_of: Backbones) -> None:
    """Ranges at the rear and at the front, and attentions that are shared and windowed, with and without adapter."""
    backbone = student_of(layout, torch.float64)
    student, rear, front = CfgStudent(), DeltaDiT(interval=2, blocks=3, boundary=9), DeltaDiT(blocks=2, boundary=0)
    table: Any = [["full"] * 6, *[["ast", "wa-rs", "full"] * 2] * 3]
    shared = plan(backbone, table, guided=False)
    requests = [
        wanted(backbone, 1, student, rear),
        wanted(backbone, 2, rear, guidance_scale=1.0),
        wanted(backbone, 3, student),
        wanted(backbone, 4),
        wanted(backbone, 5, student, front),
        wanted(backbone, 6, front),
        wanted(backbone, 7, student, shared),
        wanted(backbone, 8, shared, guidance_scale=1.0),
    ]
    check(backbone, requests, [0, 1, 0, 0, 1, 0, 1, 0])


@pytest.mark.parametrize("methods", [["asc"] * 3, ["wa-rs+asc"] * 3, ["asc", "wa-rs", "ast"]])
@pytest.mark.parametrize("layout", ["pixart-sigma", "dit"])
def test_twins_take_their_own_conditional_row(layout: str, methods: list[Any], backbone_of: Backbones) -> None:
    """Its result in the same step, and the residual that it left for a later one."""
    backbone = backbone_of(layout, torch.float64)
    table: Any = [["full"] * 6, *([method] * 6 for method in methods)]
    requests = [wanted(backbone, seed, plan(backbone, table)) for seed in (1, 2, 3)]
    requests.insert(1, wanted(backbone, 4))
    requests.append(wanted(backbone, 5, guidance_scale=1.0))
    check(backbone, requests, [0, 0, 1, 0, 0])


@pytest.mark.parametrize("layout", ["pixart-alpha", "dit"])
def test_several_windows_in_one_tick(layout: str, backbone_of: Backbones) -> None:
    """Each row keeps the residual of its own band, and attends in it."""
    backbone = backbone_of(layout, torch.float64)
    table: Any = [["full"] * 6, *[["wa-rs", "full", "wa-rs+asc"] * 2] * 3]
    requests = [wanted(backbone, w, plan(backbone, table, window=w)) for w in (0, 3, 11, 40)]
    check(backbone, [*requests, wanted(backbone, 5)], [0, 0, 0, 1, 0])


@pytest.mark.parametrize("layout", ["pixart-alpha", "dit"])
def test_ranges_of_every_width_and_side(layout: str, backbone_of: Backbones) -> None:
    backbone = backbone_of(layout, torch.float64)
    shapes = [(2, 5, 9), (3, 4, 1), (2, 1, 9), (9, 3, 2), (2, 2, 0), (3, 5, 0)]
    requests = [
        wanted(backbone, seed, DeltaDiT(interval=i, blocks=n, boundary=b), num_inference_steps=5)
        for seed, (i, n, b) in enumerate(shapes)
    ]
    check(backbone, [*requests, wanted(backbone, 7)], [0, 1, 0, 2, 1, 0, 1])


@pytest.mark.parametrize(("layout", "depth"), [("sd", 9), ("sdxl", 6)])
def test_exits_at_every_level_in_one_tick(layout: str, depth: int, backbone_of: Backbones) -> None:
    backbone = backbone_of(layout, torch.float64)
    assert backbone.spec.depth == depth
    cached = [
        wanted(backbone, seed, DeepCache(interval=2, branch=seed), num_inference_steps=3) for seed in range(depth)
    ]
    zeros = [wanted(backbone, 20 + d, DepthSkip(depth=d), num_inference_steps=3) for d in (1, 4, depth)]
    check(backbone, [*cached, *zeros, wanted(backbone, 30)], [seed % 2 for seed in range(depth)] + [0, 1, 0, 0])


@pytest.mark.parametrize("layout", ["sd", "pixart-alpha"])
def test_guided_stretches_side_by_side(layout: str, backbone_of: Backbones) -> None:
    backbone = backbone_of(layout, torch.float64)
    cached = DeepCache(interval=3) if layout == "sd" else DeltaDiT(interval=3)
    stretches = [(0.0, 0.5), (0.2, 1.0), (0.5, 1.0), (0.0, 1.0)]
    requests = [
        wanted(backbone, seed, SelectiveGuidance(start=a, stop=b), cached, num_inference_steps=5)
        for seed, (a, b) in enumerate(stretches)
    ]
    check(backbone, requests, [0, 2, 0, 1])


def test_embeddings_of_several_lengths(backbone_of: Backbones) -> None:
    """Which cannot share a forward, and need not."""
    backbone = backbone_of("sd", torch.float64)
    torch.manual_seed(2)
    requests = [
        Request(
            prompt_embeds=torch.randn(1, length, 32),
            negative_prompt_embeds=torch.randn(1, length, 32),
            num_inference_steps=3,
            guidance_scale=3.0,
            seed=length,
            acceleration=DeepCache(interval=2),
        )
        for length in (7, 9, 7)
    ]
    together = generate(backbone, requests)
    for single, mixed in zip(requests, together, strict=True):
        [alone] = generate(backbone, [single])
        assert (mixed.latents - alone.latents).norm() <= 1e-10 * alone.latents.norm()


@pytest.mark.parametrize("layout", ["sd", "pixart-sigma"])
def test_upright_beside_lying_pictures(layout: str, backbone_of: Backbones) -> None:
    """Of equally many latents, so that only the sides tell them apart."""
    backbone = backbone_of(layout, torch.float64)
    cached = DeepCache(interval=2) if layout == "sd" else DeltaDiT()
    sizes = [(48, 32), (32, 48), (48, 32)]
    requests = [wanted(backbone, i, cached, width=w, height=h) for i, (w, h) in enumerate(sizes)]
    together = generate(backbone, requests)
    assert [result.images[0].size for result in together] == sizes
    for single, mixed in zip(requests, together, strict=True):
        [alone] = generate(backbone, [single])
        assert (mixed.latents - alone.latents).norm() <= 1e-10 * alone.latents.norm()


TABLES: dict[str, list[str]] = {
    "a residual of before the wait": ["full", "full", "wa-rs", "full", "wa-rs", "wa-rs"],
    "an output of before the wait": ["full", "full", "ast", "wa-rs", "ast", "full"],
    "a band over the wait": ["full", "wa-rs", "wa-rs", "asc", "wa-rs+asc", "ast"],
}


@pytest.mark.parametrize("case", TABLES)
@pytest.mark.parametrize("layout", ["dit", "pixart-sigma"])
def test_attention_of_blocks_that_wait(layout: str, case: str, backbone_of: Backbones, pipeline_of: Pipelines) -> None:
    """What a block remembers is of the last step in which it ran, not of one in which its range was cached."""
    backbone, delta = backbone_of(layout, torch.float64), (2, 3, 4)
    table: Any = [[method] * 6 for method in TABLES[case]]
    texts = {"prompt": "a red circle", "negative_prompt": "dull"}
    content: dict[str, Any] = {"class_label": 5} if layout == "dit" else texts
    cached = DeltaDiT(interval=delta[0], blocks=delta[1], boundary=delta[2])
    options: dict[str, Any] = {"seed": 1, "num_inference_steps": 6, "guidance_scale": 3.0, "scheduler": "ddim"}
    [result] = generate(
        backbone, [Request(**content, **options, acceleration=[attention_plan(backbone, table, True), cached])]
    )
    expected = reference(pipeline_of(layout, torch.float64), layout, True, table, delta)
    assert (result.latents - expected).norm() <= 1e-10 * expected.norm()


@contextmanager
def forwards(backbone: Backbone) -> Iterator[list[tuple[int, ...]]]:
    """The shape [rows, channels, h, w] of every forward of a network, as its first convolution sees it."""
    module: Any = backbone.network.module
    first = module.conv_in if hasattr(module, "conv_in") else module.pos_embed.proj
    seen: list[tuple[int, ...]] = []
    handle = first.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("max_rows", "rows"),
    [
        (64, [7, 7]),
        (7, [7, 7]),
        (6, [6, 5, 3]),
        (5, [4, 5, 5]),
        (4, [4, 3, 4, 3]),
        (3, [2, 2, 3, 2, 2, 3]),
        (1, [2, 2, 2, 1, 2, 2, 2, 1]),
    ],
)
def test_rows_that_share_a_forward(max_rows: int, rows: list[int], backbone_of: Backbones) -> None:
    """Three guided requests of two rows and one of one, two steps each: in turn from the head of the line."""
    backbone = backbone_of("sd")
    requests = [wanted(backbone, seed, num_inference_steps=2) for seed in range(3)]
    requests.append(wanted(backbone, 3, num_inference_steps=2, guidance_scale=1.0))
    told: list[tuple[int, int]] = []
    with forwards(backbone) as seen:
        generate(backbone, requests, max_rows=max_rows, progress=lambda done, total: told.append((done, total)))
    assert [shape[0] for shape in seen] == rows
    assert [total for _, total in told] == [8] * len(rows)
    assert told[-1] == (8, 8)
    steps = [after - before for (before, _), (after, _) in zip([(0, 8), *told], told, strict=False)]
    assert sum(steps) == 8
    assert all(step == (n + 1) // 2 for step, n in zip(steps, rows, strict=True))


@pytest.mark.parametrize("layout", ["sd", "pixart-alpha"])
def test_sizes_take_turns(layout: str, backbone_of: Backbones) -> None:
    """Tick by tick, each with all its rows, until the shorter runs are through; height before width."""
    backbone = backbone_of(layout)
    requests = [
        wanted(backbone, 0, num_inference_steps=3, width=48, height=32),
        wanted(backbone, 1, num_inference_steps=2, width=32, height=48, guidance_scale=1.0),
        wanted(backbone, 2, num_inference_steps=1, width=48, height=32),
    ]
    with forwards(backbone) as seen:
        generate(backbone, requests)
    lying, upright = (16, 24), (24, 16)
    turns = [(4, *lying), (1, *upright), (2, *lying), (1, *upright), (2, *lying)]
    assert [(rows, h, w) for rows, _, h, w in seen] == turns


def test_nothing_runs_before_all_requests_are_checked(backbone_of: Backbones) -> None:
    backbone = backbone_of("sd")
    with forwards(backbone) as seen, pytest.raises(Exception, match="width"):
        generate(backbone, [wanted(backbone, 0), wanted(backbone, 1, width=33)])
    assert not seen
