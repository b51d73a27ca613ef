"""DeepCache against its authors' package, bit for bit, and against what it must not be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from DeepCache import DeepCacheSDHelper
from PIL import Image
from torch import Tensor

from models import Backbone, Request, generate
from models.accelerators import DeepCache, NoAcceleration
from models.accelerators.base import Accelerator
from models.reuse import plans
from models.reuse.compile import compile_run
from models.reuse.plans import StepPlan
from models.reuse.rows import Row
from models.reuse.store import FeatureStore, Memory
from models.solvers.names import REGISTRY
from tests.reference import by_pipeline, generators

TEXT: dict[str, Any] = {
    "prompt": "a red circle",
    "negative_prompt": "dull",
    "num_inference_steps": 5,
    "guidance_scale": 3.0,
}
BRANCHES = [*(("sd", branch) for branch in range(9)), ("sdxl", 0), ("sdxl", 3), ("sdxl", 5)]

Backbones = Callable[..., Backbone]
Pipelines = Callable[..., Any]


def request(accelerator: Accelerator, **options: Any) -> Request:
    return Request(**{**TEXT, "scheduler": "ddim", "acceleration": accelerator, **options})


def ours(backbone: Backbone, accelerator: Accelerator, guided: bool = True, images: int = 1) -> Tensor:
    scale = 3.0 if guided else 1.0
    return generate(backbone, [request(accelerator, guidance_scale=scale, num_images=images)])[0].latents


def theirs(pipeline: Any, interval: int, branch: int, guided: bool = True, images: int = 1) -> Tensor:
    return by_pipeline(
        pipeline,
        "ddim",
        within=package(interval, branch),
        num_images_per_prompt=images,
        generator=generators(0, images),
        **{**TEXT, "guidance_scale": 3.0 if guided else 1.0},
    ).latents


class Counting(DeepCacheSDHelper):  # type: ignore[misc]
    """The package with its fault mended: it counts forwards, where it would look the time up in a list of times."""

    def wrap_unet_forward(self) -> None:
        plain = self.function_dict["unet_forward"] = self.pipe.unet.forward
        self.cur_timestep = -1

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.cur_timestep += 1
            return plain(*args, **kwargs)

        self.pipe.unet.forward = counted


def package(
    interval: int, branch: int, helper_class: type[DeepCacheSDHelper] = DeepCacheSDHelper
) -> Callable[[Any], AbstractContextManager[None]]:
    """The package at work on a pipeline, and taken off it afterwards."""

    @contextmanager
    def within(pipeline: Any) -> Iterator[None]:
        helper = helper_class(pipeline)
        helper.set_params(cache_interval=interval, cache_branch_id=branch)
        helper.enable()
        try:
            yield
        finally:
            helper.disable()

    return within


@pytest.mark.parametrize("interval", [1, 2, 3, 5])
@pytest.mark.parametrize(("layout", "branch"), BRANCHES)
def test_equals_the_package(
    layout: str, branch: int, interval: int, backbone_of: Backbones, pipeline_of: Pipelines
) -> None:
    """Their `cache_branch_id` is our `branch`."""
    accelerated = ours(backbone_of(layout), DeepCache(interval=interval, branch=branch))
    assert torch.equal(accelerated, theirs(pipeline_of(layout), interval, branch))


@pytest.mark.parametrize(("guided", "images"), [(True, 2), (False, 1), (False, 2)])
@pytest.mark.parametrize("branch", [0, 4, 8])
def test_equals_the_package_in_every_batch_shape(
    branch: int, guided: bool, images: int, backbone_of: Backbones, pipeline_of: Pipelines
) -> None:
    accelerated = ours(backbone_of("sd"), DeepCache(interval=2, branch=branch), guided, images)
    assert torch.equal(accelerated, theirs(pipeline_of("sd"), 2, branch, guided, images))


@pytest.mark.parametrize("strength", [None, 0.6])
@pytest.mark.parametrize("scheduler", sorted(set(REGISTRY) - {"ddim"}))
def test_every_scheduler(
    scheduler: str, strength: float | None, backbone_of: Backbones, pipeline_of: Pipelines
) -> None:
    """Two evaluations a step (Heun), repeated times (PNDM, Heun): a step is one evaluation of the network."""
    picture = Image.new("RGB", (32, 32), "teal")
    given: dict[str, Any] = {} if strength is None else {"image": picture, "strength": strength}
    [result] = generate(backbone_of("sd"), [request(DeepCache(interval=3, branch=4), scheduler=scheduler, **given)])
    expected = by_pipeline(
        pipeline_of("sd"), scheduler, within=package(3, 4, Counting), generator=generators(0, 1), **TEXT, **given
    )
    assert torch.equal(result.latents, expected.latents)


def test_another_branch_is_another_picture(backbone_of: Backbones, pipeline_of: Pipelines) -> None:
    """So that equality at every branch means something."""
    pictures = [ours(backbone_of("sd"), DeepCache(interval=3, branch=branch)) for branch in range(9)]
    assert all(not torch.equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])
    assert not torch.equal(pictures[3], theirs(pipeline_of("sd"), 3, 4))


class Zeros(DeepCache):
    """The paper's negative control: the same shallow steps, with zeros in place of the memory."""

    def plan(self, step: int, num_steps: int) -> StepPlan:
        return StepPlan(dict.fromkeys(super().plan(step, num_steps).reuse, plans.Zeros()))


@pytest.mark.parametrize("branch", [0, 3, 7])
def test_zeros_in_place_of_the_memory_are_worse(branch: int, backbone_of: Backbones) -> None:
    """What is remembered matters, not only that something is skipped."""
    backbone = backbone_of("sd")
    plain = ours(backbone, NoAcceleration())
    cached = ours(backbone, DeepCache(interval=2, branch=branch))
    zeros = ours(backbone, Zeros(interval=2, branch=branch))
    assert (zeros - plain).norm() > 1.5 * (cached - plain).norm()


def test_interval_1_is_no_acceleration(backbone_of: Backbones) -> None:
    [plain] = generate(backbone_of("sd"), [request(NoAcceleration())])
    assert torch.equal(ours(backbone_of("sd"), DeepCache(interval=1, branch=0)), plain.latents)


@pytest.mark.parametrize("branch", range(9))
def test_remembers_what_enters_the_closing_output_block(branch: int, backbone_of: Backbones) -> None:
    """A shallow forward at the same input and time as its full one gives the same prediction, bit for bit."""
    network = backbone_of("sd").network
    x, t = torch.randn(1, 4, 16, 16), torch.tensor([400.0])
    conditioning = {"encoder_hidden_states": torch.randn(1, 5, 32)}
    steps = compile_run(network.sites, (DeepCache(interval=2, branch=branch),), 2, guided=False)
    memory, store = Memory(), FeatureStore()
    plain, shallow = (
        network.forward(x, t, conditioning, [Row(step.conditional, "conditional", None, memory)], store)
        for step in steps
        if step.conditional is not None
    )
    assert torch.equal(plain, shallow)
