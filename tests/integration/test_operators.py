"""What a tick asks of the device does not grow with its trajectories: operators dispatched, for 1 and for 32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from models import Backbone, Request, advance
from models.accelerators import DeepCache, DeltaDiT, SelectiveGuidance
from models.accelerators.base import Accelerator
from models.generate import start
from models.networks.sites import blocks, level
from models.resolve import resolve
from models.reuse.plans import Recall, StepPlan
from models.reuse.sites import OUTPUT, Site
from models.solvers.names import REGISTRY
from models.trajectory import Trajectory
from tests.integration.test_mixed import attention
from tests.operators import operators

Backbones = Callable[..., Backbone]
STEPS = 4


def batched(backbone: Backbone) -> Backbone:
    return replace(backbone, stepping="batched")


def begun(backbone: Backbone, count: int, scheduler: str, accelerators: Sequence[Accelerator]) -> list[Trajectory]:
    """Trajectories of different seeds after their first step."""
    wanted = Request(
        prompt="a ring",
        guidance_scale=3.0,
        scheduler=scheduler,
        num_inference_steps=STEPS,
        num_images=count,
        acceleration=accelerators,
    )
    trajectories = start(backbone, resolve(backbone.spec, backbone.scheduler_config, wanted))
    advance(backbone, trajectories)
    return trajectories


def growth(backbone: Backbone, scheduler: str = "ddim", accelerators: Sequence[Accelerator] = ()) -> int:
    """Operators of the second step of 32 trajectories beyond those of one."""
    few, many = (begun(backbone, count, scheduler, accelerators) for count in (1, 32))
    return operators(lambda: advance(backbone, many)) - operators(lambda: advance(backbone, few))


@pytest.mark.parametrize("scheduler", REGISTRY)
@pytest.mark.parametrize("layout", ["sd", "pixart-sigma"])
def test_plain_steps_under_every_scheduler(layout: str, scheduler: str, backbone_of: Backbones) -> None:
    """Those that draw noise draw it for one trajectory after another, on the host."""
    assert abs(growth(batched(backbone_of(layout)), scheduler)) <= 64


def test_a_tick_of_all_schedulers(backbone_of: Backbones) -> None:
    """Once a scheduler, and four times."""
    backbone = batched(backbone_of("sd"))
    few, many = ([t for name in REGISTRY for t in begun(backbone, n, name, ())] for n in (1, 4))
    assert operators(lambda: advance(backbone, many)) <= operators(lambda: advance(backbone, few)) + 64


@pytest.mark.parametrize(
    ("layout", "accelerators"),
    [
        ("sd", [DeepCache(interval=2)]),
        ("sd", [DeepCache(interval=2, branch=4)]),
        ("sd", [DeepCache(interval=2), SelectiveGuidance(stop=0.2)]),
        ("pixart-sigma", [DeltaDiT(interval=2)]),
        ("pixart-sigma", [DeltaDiT(interval=2, blocks=3, boundary=0)]),
    ],
)
def test_steps_that_reuse(layout: str, accelerators: Sequence[Accelerator], backbone_of: Backbones) -> None:
    assert abs(growth(batched(backbone_of(layout)), "ddim", accelerators)) <= 64


class Forecast(Accelerator):
    """Every second step foretold at a site."""

    mode: str = "forecast"
    site: Site

    def plan(self, step: int, num_steps: int) -> StepPlan:
        return StepPlan({self.site: Recall(order=1)} if step % 2 else {})


@pytest.mark.parametrize(
    ("layout", "site"), [("sd", OUTPUT), ("sd", level(2)), ("pixart-sigma", OUTPUT), ("pixart-sigma", blocks(1, 5))]
)
def test_steps_that_foretell(layout: str, site: Site, backbone_of: Backbones) -> None:
    assert abs(growth(batched(backbone_of(layout)), "dpmpp_2m", [Forecast(site=site)])) <= 64


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_steps_under_a_plan_of_all_methods(seed: int, backbone_of: Backbones) -> None:
    backbone = batched(backbone_of("pixart-sigma"))
    chosen = attention(backbone, seed, "ddim", STEPS, guided=True, window=5)
    assert abs(growth(backbone, "ddim", [chosen])) <= 128


def test_exact_stepping_grows(backbone_of: Backbones) -> None:
    """So that the counts above mean something."""
    assert growth(backbone_of("sd"), "unipc") > 1000
