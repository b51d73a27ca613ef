"""Reduced steps really skip: the products that a run multiplies on the CPU are those its plan predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import Backbone, Request, advance
from models.costs.macs import Usage, usage
from models.generate import start
from models.resolve import resolve
from tests.integration.test_mixed import CASES, request

Backbones = Callable[..., Backbone]


def counted(backbone: Backbone, requests: Sequence[Request]) -> tuple[int, list[Usage]]:
    """MACs of a whole batch, and what each request was told. Plain attention kernels, as torch counts no other."""
    runs = [resolve(backbone.spec, backbone.scheduler_config, wanted) for wanted in requests]
    trajectories = [t for run in runs for t in start(backbone, run)]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        while active := [t for t in trajectories if not t.done]:
            advance(backbone, active)
    return counter.get_total_flops() // 2, [usage(backbone, run) for run in runs]


@pytest.mark.parametrize(("layout", "name"), [(layout, name) for layout, cases in CASES.items() for name in cases])
def test_a_run_does_the_predicted_work(layout: str, name: str, student_of: Backbones) -> None:
    backbone = student_of(layout)
    macs, [predicted] = counted(backbone, [request(layout, name, backbone)])
    assert macs == pytest.approx(predicted.macs, rel=0.01)
    reduced = name not in ("none", "unguided") or (name == "unguided" and layout != "sd")
    assert (predicted.macs < predicted.macs_unaccelerated) == reduced


@pytest.mark.parametrize("layout", CASES)
def test_a_mixed_batch_does_the_sum_of_its_parts(layout: str, student_of: Backbones) -> None:
    backbone = student_of(layout)
    macs, predicted = counted(backbone, [request(layout, name, backbone) for name in CASES[layout]])
    assert macs == pytest.approx(sum(p.macs for p in predicted), rel=0.01)


@pytest.mark.parametrize("layout", ["sd2", "sdxl", "pixart-alpha"])
def test_the_other_layouts(layout: str, backbone_of: Backbones) -> None:
    requests = [Request(prompt="a ring", num_inference_steps=2, guidance_scale=s, num_images=2) for s in (1.0, 3.0)]
    macs, predicted = counted(backbone_of(layout), requests)
    assert macs == pytest.approx(sum(p.macs for p in predicted), rel=0.01)
    assert [p.rows for p in predicted] == [4, 8]
    assert [p.steps for p in predicted] == [2, 2]


def test_odd_sizes(backbone_of: Backbones) -> None:
    backbone = backbone_of("sd")
    macs, [predicted] = counted(backbone, [Request(prompt="a ring", width=36, height=20, num_inference_steps=1)])
    assert macs == pytest.approx(predicted.macs, rel=0.01)


def test_the_counter_sees_attention(backbone_of: Backbones) -> None:
    """So that equal counts mean something: without the plain kernels torch counts less."""
    backbone = backbone_of("pixart-sigma")
    [trajectory] = start(
        backbone, resolve(backbone.spec, backbone.scheduler_config, Request(prompt="a ring", num_inference_steps=1))
    )
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        advance(backbone, [trajectory])
    macs, _ = counted(backbone, [Request(prompt="a ring", num_inference_steps=1)])
    assert counter.get_total_flops() // 2 < 0.99 * macs
