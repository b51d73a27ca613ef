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
from models.solvers.names import REGISTRY, default_name, noise_schedule, supported, takes, warped_timesteps

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


def test_no_default_with_options_of_its_own() -> None:
    """Karras sigmas share their class with the plain solver, whose name is the default's."""
    assert default_name({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}) == "dpmpp_2m"
    assert default_name({}) == "ddim"


def test_karras_sigmas_are_karras() -> None:
    plain, karras = (noise_schedule(name, CONFIG, 8).timesteps for name in ("dpmpp_2m", "dpmpp_2m_karras"))
    assert plain.tolist() != karras.tolist()
    assert noise_schedule("dpmpp_2m_karras", CONFIG, 8).scheduler.config.use_karras_sigmas


CLASSES = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_karras": "DPMSolverMultistepScheduler",
    "heun": "HeunDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}


@pytest.mark.parametrize("name", REGISTRY)
def test_a_schedule_is_its_names_class_with_the_models_config(name: str) -> None:
    config: Any = DDIMScheduler(num_train_timesteps=500, prediction_type="v_prediction").config
    scheduler = noise_schedule(name, config, 5).scheduler
    assert type(scheduler).__name__ == CLASSES[name]
    assert (scheduler.config.num_train_timesteps, scheduler.config.prediction_type) == (500, "v_prediction")


def test_schedules_are_shared_by_runs_that_are_alike_in_everything() -> None:
    other: Any = dict(CONFIG)
    first = noise_schedule("ddim", CONFIG, 5, 0.8, 0.5)
    assert noise_schedule("ddim", CONFIG, 5, 0.8, 0.5) is first
    others = [
        noise_schedule("dpmpp_2m", CONFIG, 5, 0.8, 0.5),
        noise_schedule("ddim", other, 5, 0.8, 0.5),
        noise_schedule("ddim", CONFIG, 6, 0.8, 0.5),
        noise_schedule("ddim", CONFIG, 5, 0.6, 0.5),
        noise_schedule("ddim", CONFIG, 5, 0.8, 2.0),
    ]
    assert all(schedule is not first for schedule in others)


def test_options_of_a_step() -> None:
    """Only what the class takes: no extra noise, and a generator where it draws."""
    assert {name: dict(takes(cls)) for name, (cls, _) in REGISTRY.items()} == {
        "ddim": {"eta": 0.0, "generator": None},
        "pndm": {},
        "euler": {"generator": None},
        "euler_ancestral": {"generator": None},
        "dpmpp_2m": {"generator": None},
        "dpmpp_2m_karras": {"generator": None},
        "heun": {},
        "unipc": {},
        "lcm": {"generator": None},
    }


def test_strength_is_of_the_warped_steps_that_are_left() -> None:
    """Of 30 leaned steps some coincide; a half is of those that do not."""
    steps = warped_timesteps(30, 12.0)
    assert len(steps) < 29
    schedule = noise_schedule("ddim", CONFIG, 30, strength=0.5, warp=12.0)
    assert schedule.begin == len(steps) - int(len(steps) * 0.5)
    assert schedule.timesteps.tolist() == steps[schedule.begin :]


def test_a_run_from_part_of_the_way_in_takes_the_solvers_step_there() -> None:
    schedule, whole = noise_schedule("euler", CONFIG, 10, 0.5), noise_schedule("euler", CONFIG, 10)
    x, out = torch.ones(1, 1), torch.full((1, 1), 0.3)
    part, full = schedule.fresh(), whole.fresh()
    full.set_begin_index(5)
    wanted = full.step(out, whole.timesteps[5], x).prev_sample
    assert torch.equal(part.step(out, schedule.timesteps[0], x).prev_sample, wanted)


def test_warped_steps_of_another_training_range_and_margin() -> None:
    assert warped_timesteps(3, 2.0, num_train_timesteps=101, margin=10.0) == [82, 20, 0]  # (t / 110)² · 100
    assert warped_timesteps(3, 0.5, num_train_timesteps=101, margin=10.0) == [100, 73, 30]  # ((t + 10) / 110)^½ · 100
    with pytest.raises(OutOfRange, match="timestep_warp: -1 is not above 0"):
        warped_timesteps(3, -1)


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
