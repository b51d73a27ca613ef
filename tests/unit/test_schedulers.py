"""Schedulers by name, what a model's noise schedule rules out, and the warped time steps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from models.errors import OutOfRange, RequestError
from models.solvers.names import REGISTRY, default_name, noise_schedule, supported, warped_timesteps

CONFIG: Any = DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False).config


def test_the_promised_names() -> None:
    names = "ddim pndm euler euler_ancestral dpmpp_2m dpmpp_2m_karras heun unipc lcm"
    assert " ".join(REGISTRY) == names
    assert supported(CONFIG) == tuple(REGISTRY)


def test_with_zero_terminal_snr_only_those_that_rescale() -> None:
    """PNDM and Heun know nothing of it: they would start from a schedule that the model was not trained on."""
    names = supported({**CONFIG, "rescale_betas_zero_snr": True})
    assert set(REGISTRY) - set(names) == {"pndm", "heun"}


@pytest.mark.parametrize("name", REGISTRY)
def test_evaluations(name: str) -> None:
    """A step is one evaluation of the backbone: Heun takes 2n - 1, PNDM twelve for its first three."""
    evaluations = {"heun": 19, "pndm": 19}.get(name, 10)
    assert len(noise_schedule(name, CONFIG, 10).timesteps) == evaluations


@pytest.mark.parametrize("name", REGISTRY)
def test_tables_stay_on_the_cpu_and_no_scheduler_is_shared(name: str) -> None:
    schedule = noise_schedule(name, CONFIG, 5)
    assert schedule is noise_schedule(name, CONFIG, 5)
    assert schedule.timesteps.device.type == "cpu"
    first, second = schedule.fresh(), schedule.fresh()
    first.step(torch.ones(1, 1), schedule.timesteps[0], torch.ones(1, 1))
    state = {k: v for k, v in vars(second).items() if isinstance(v, int | float | None)}
    assert state == {k: v for k, v in vars(schedule.scheduler).items() if isinstance(v, int | float | None)}


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("strength", [0.2, 0.55, 1.0])
def test_image_to_image_begins_part_of_the_way_in(name: str, strength: float) -> None:
    schedule, whole = noise_schedule(name, CONFIG, 10, strength), noise_schedule(name, CONFIG, 10)
    assert schedule.begin == (10 - int(10 * strength)) * schedule.scheduler.order
    assert torch.equal(schedule.timesteps, whole.timesteps[schedule.begin :])


@pytest.mark.parametrize("name", sorted(set(REGISTRY) - {"pndm"}))
def test_one_step(name: str) -> None:
    assert len(noise_schedule(name, CONFIG, 1).timesteps) == 1


def test_too_few_steps_name_the_field() -> None:
    """PNDM with its Runge-Kutta start cannot do one step."""
    with pytest.raises(OutOfRange, match="pndm cannot take 1 steps") as caught:
        noise_schedule("pndm", CONFIG, 1)
    assert caught.value.field == "num_inference_steps"


def test_too_many_steps_name_the_field() -> None:
    with pytest.raises(OutOfRange, match="lcm cannot take 60 steps") as caught:
        noise_schedule("lcm", CONFIG, 60)
    assert caught.value.field == "num_inference_steps"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"_class_name": "DDIMScheduler"}, "ddim"),
        ({"_class_name": "EulerDiscreteScheduler"}, "euler"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "dpmpp_2m"),
        ({"_class_name": "EDMEulerScheduler"}, "ddim"),
    ],
)
def test_the_default_is_the_pipelines_own(config: Any, name: str) -> None:
    assert default_name(config) == name


counts, gammas = st.integers(1, 200), st.floats(0.05, 20.0)


@given(counts, gammas)
def test_warped_steps_descend_within_the_training_range(count: int, gamma: float) -> None:
    steps = warped_timesteps(count, gamma)
    assert 1 <= len(steps) <= count
    assert all(0 <= t <= 999 for t in steps)
    assert all(a > b for a, b in pairwise(steps))


@given(st.integers(5, 50), st.floats(1.1, 5.0))
def test_gamma_below_one_leans_to_noise_and_above_to_clean(count: int, gamma: float) -> None:
    noisy, even, clean = (warped_timesteps(count, g) for g in (1 / gamma, 1.0, gamma))
    assert sum(noisy) / len(noisy) > sum(even) / len(even) > sum(clean) / len(clean)


def test_gamma_one_is_even() -> None:
    assert warped_timesteps(5, 1.0) == [999, 749, 499, 249, 0]


@pytest.mark.parametrize(
    ("gamma", "expected"),
    [
        (2.0, [941, 529, 235, 58, 0]),  # t' = (t / 1029)² · 999
        (0.5, [999, 869, 716, 520, 170]),  # t' = ((t + 30) / 1029)^½ · 999
    ],
)
def test_worked_examples(gamma: float, expected: list[int]) -> None:
    assert warped_timesteps(5, gamma) == expected


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan"), float("inf")])
def test_gamma_must_be_a_positive_number(gamma: float) -> None:
    with pytest.raises(OutOfRange, match="timestep_warp"):
        warped_timesteps(5, gamma)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_warped_runs_take_those_steps(name: str) -> None:
    schedule = noise_schedule(name, CONFIG, 6, warp=0.5)
    assert schedule.timesteps.tolist() == warped_timesteps(6, 0.5)
    partial = noise_schedule(name, CONFIG, 6, strength=0.5, warp=0.5)
    assert partial.timesteps.tolist() == warped_timesteps(6, 0.5)[3:]


def test_warped_ddim_takes_ddims_step() -> None:
    """DDIM's formula between two warped times, written out."""
    schedule = noise_schedule("ddim", CONFIG, 6, warp=0.5)
    scheduler, (now, then) = schedule.fresh(), schedule.timesteps[:2].tolist()
    x, eps = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    signal, noise = (
        f(DDIMScheduler.from_config(CONFIG).alphas_cumprod.double()) for f in (torch.sqrt, lambda a: (1 - a).sqrt())
    )
    clean = (x - noise[now] * eps) / signal[now]
    expected = signal[then] * clean + noise[then] * eps
    stepped = scheduler.step(eps, schedule.timesteps[0], x).prev_sample
    assert torch.allclose(stepped.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(set(REGISTRY) - {"ddim", "dpmpp_2m"}))
def test_the_others_cannot_be_warped(name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} takes no custom time steps"):
        noise_schedule(name, CONFIG, 6, warp=2.0)
