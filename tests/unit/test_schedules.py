"""Which steps an accelerator takes in full, at odd depths, lengths and schedulers, against plain formulas."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from diffusers import DDIMScheduler

from models.accelerators import DeepCache, DeltaDiT, SelectiveGuidance
from models.accelerators.deepcache import nonuniform_steps
from models.errors import OutOfRange
from models.networks.sites import blocks as at
from models.request import Request
from models.resolve import resolve
from models.reuse.plans import Recall
from tests.unit.specs import dit_spec, run_spec, unet_spec

CONFIG = DDIMScheduler().config


@pytest.mark.parametrize(
    ("depth", "blocks"), [(2, 1), (3, 2), (4, 3), (5, 3), (6, 4), (7, 5), (9, 6), (10, 7), (11, 8), (27, 20), (28, 21)]
)
def test_delta_dit_caches_three_quarters_of_the_blocks(depth: int, blocks: int) -> None:
    """Rounded down, whatever the depth; the rear ones first, then the front ones."""
    bound = DeltaDiT().bind(dit_spec(depth), run_spec(8))
    assert (bound.blocks, bound.boundary) == (blocks, 4)
    ranges = [bound.plan(step, 8).reuse for step in range(8)]
    rear, front = {at(depth - blocks, depth): Recall()}, {at(0, blocks): Recall()}
    assert ranges == [{}, rear, {}, rear, {}, front, {}, front]


def test_one_block_leaves_nothing_to_cache() -> None:
    with pytest.raises(OutOfRange, match=r"1 is not in 1\.\.0"):
        DeltaDiT().bind(dit_spec(1), run_spec(8))


@pytest.mark.parametrize(
    ("scheduler", "steps", "boundary"),
    [("ddim", 10, 5), ("ddim", 7, 3), ("heun", 10, 9), ("heun", 5, 4), ("pndm", 10, 9), ("ddim", 1, 0)],
)
def test_delta_dit_changes_sides_half_way_through_the_evaluations(scheduler: str, steps: int, boundary: int) -> None:
    """Heun evaluates 2n - 1 times and PNDM nine times more than asked: half of those, not of the steps."""
    request = Request(prompt="a ring", scheduler=scheduler, num_inference_steps=steps, acceleration=DeltaDiT())
    run = resolve(dit_spec(), CONFIG, request)
    [bound] = run.accelerators
    assert isinstance(bound, DeltaDiT)
    assert (bound.blocks, bound.boundary) == (21, boundary)


def from_the_paper(num_steps: int, count: int, center: int, power: float) -> list[int] | None:
    """Equation 7 as the authors' package computes it: complex powers, cut to whole numbers.

    None where it gives up, and where a point lies on a whole number but for rounding.
    """
    while power > 1:
        ends = [complex(end) ** (1 / power) for end in (-center, num_steps - center)]
        points = (np.linspace(ends[0], ends[1], count + 1)[1:-1] ** power).real
        if (np.abs(points - points.round()) < 1e-6).any():
            return None
        found = [0, *(int(x) + center for x in np.unique(points.astype(np.int32)))]
        if len(found) == count:
            return found
        power -= 0.02
    return None


def schedules() -> list[tuple[int, int, int, float]]:
    pick = random.Random(7)
    powers = [1.1, 1.2, 1.3, 1.4, 1.5, 1.7, 2.0]
    return [
        (num, pick.randint(2, 9), pick.randint(1, num - 2), pick.choice(powers))
        for num in (pick.randint(10, 120) for _ in range(300))
    ]


def test_nonuniform_schedules_are_the_papers() -> None:
    """Also of lengths that the interval does not divide, and for centres at either end."""
    compared = 0
    for num_steps, interval, center, power in schedules():
        expected = from_the_paper(num_steps, math.ceil(num_steps / interval), center, power)
        if expected is None or min(expected) < 0:
            continue
        compared += 1
        assert sorted(nonuniform_steps(num_steps, interval, center, power)) == sorted(expected), (
            num_steps,
            interval,
            center,
            power,
        )
    assert compared > 200


@pytest.mark.parametrize(
    ("start", "stop", "steps", "guided"),
    [
        (0.0, 0.8, 5, "11110"),
        (0.0, 0.5, 7, "1111000"),
        (0.25, 0.75, 8, "00111100"),
        (0.1, 1.0, 6, "011111"),
        (0.34, 0.67, 3, "001"),
        (0.9, 1.0, 4, "0000"),
        (0.0, 0.01, 4, "1000"),
        (0.0, 1.0, 3, "111"),
        (0.28, 0.56, 25, "0" * 7 + "1" * 7 + "0" * 11),
    ],
)
def test_guidance_begins_at_its_first_step_and_ends_before_its_last(
    start: float, stop: float, steps: int, guided: str
) -> None:
    accelerator = SelectiveGuidance(start=start, stop=stop)
    assert "".join("01"[bool(accelerator.plan(step, steps).guided)] for step in range(steps)) == guided
    run = resolve(unet_spec(), CONFIG, Request(prompt="a ring", num_inference_steps=steps, acceleration=accelerator))
    assert "".join(str(step.num_rows - 1) for step in run.steps) == guided


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_scales_up_to_one_need_one_row(scale: float) -> None:
    run = resolve(unet_spec(), CONFIG, Request(prompt="a ring", num_inference_steps=3, guidance_scale=scale))
    assert [step.num_rows for step in run.steps] == [1, 1, 1]
    above = resolve(unet_spec(), CONFIG, Request(prompt="a ring", num_inference_steps=3, guidance_scale=1.01))
    assert [step.num_rows for step in above.steps] == [2, 2, 2]


def test_equal_values_bound_to_two_models_stay_apart() -> None:
    """Their ranges come from the model's depth, which a run remembered by its accelerators alone would mix up."""
    request = Request(prompt="a ring", num_inference_steps=4, acceleration=DeltaDiT(blocks=2, boundary=4))
    for depth in (5, 9):
        [bound] = resolve(dit_spec(depth), CONFIG, request).accelerators
        assert bound.plan(1, 4).reuse == {at(depth - 2, depth): Recall()}


def test_deepcache_counts_evaluations_not_steps() -> None:
    request = Request(prompt="a ring", scheduler="heun", num_inference_steps=4, acceleration=DeepCache(interval=3))
    run = resolve(unet_spec(), CONFIG, request)
    assert [step.reduced for step in run.steps] == [False, True, True, False, True, True, False]
