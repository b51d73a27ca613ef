"""Stepping by diffusers' own scheduler, one trajectory at a time: bit for bit what its pipelines do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.masks import blend
from models.reuse.plans import Role
from models.trajectory import Trajectory


def model_input(trajectory: Trajectory) -> Tensor:
    """The latents [1, channels, h, w] as the network wants them at this time."""
    if not hasattr(trajectory.scheduler, "scale_model_input"):  # flow matching
        return trajectory.state
    scaled: Tensor = trajectory.scheduler.scale_model_input(trajectory.state, trajectory.timestep)
    return scaled


def combine(trajectory: Trajectory, predictions: Mapping[Role, Tensor]) -> Tensor:
    """One prediction like the latents out of those of the rows, [1, channels or twice as many, h, w] each.

    The second half of the channels is a learned variance, which these schedulers do not use.
    """
    prediction = trajectory.guidance.combine(predictions, trajectory.scales)
    if prediction.shape[1] != trajectory.state.shape[1]:
        prediction = prediction.chunk(2, dim=1)[0]
    return prediction


def step(trajectory: Trajectory, prediction: Tensor) -> Tensor:
    """The next latents [1, channels, h, w], the picture's outside a mask. The scheduler's own history goes on."""
    options = dict(trajectory.step_options)
    if "generator" in options:
        options["generator"] = trajectory.generator
    following: Tensor = trajectory.scheduler.step(
        prediction, trajectory.timestep, trajectory.state, **options, return_dict=False
    )[0]
    if trajectory.outside is None:
        return following
    return blend(following, _original(trajectory, following.dtype), trajectory.outside.inside)


def _original(trajectory: Trajectory, dtype: torch.dtype) -> Tensor:
    """The picture's latents [1, channels, h, w] at the noise level of the step that follows the one just taken."""
    assert trajectory.outside is not None  # noqa: S101
    clean, noise, following = trajectory.outside.clean, trajectory.outside.noise, trajectory.step + 1
    if following == trajectory.num_steps:
        return clean
    scheduler = trajectory.scheduler
    signal, sigma = mixture(scheduler, trajectory.timesteps[following : following + 1], dtype)
    if hasattr(scheduler, "add_noise"):
        return signal * clean + sigma * noise
    return sigma * noise + signal * clean


def mixture(scheduler: Any, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `add_noise` weighs samples and noise with at a time [1]: read off it with ones and zeros, on the CPU.

    Given latents on a device, `add_noise` would move the scheduler's tables there, and every step would wait for them.
    """
    one, zero = torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype)
    if hasattr(scheduler, "add_noise"):
        weights = (scheduler.add_noise(*pair, timesteps).reshape(()) for pair in ((one, zero), (zero, one)))
    else:
        weights = (scheduler.scale_noise(a, timesteps, b).reshape(()) for a, b in ((one, zero), (zero, one)))
    signal, sigma = weights
    return signal, sigma


def foresee(trajectory: Trajectory, prediction: Tensor) -> Tensor:
    """The clean latents that a prediction points to, [1, channels, h, w]; before the step is taken."""
    x, scheduler = model_input(trajectory), trajectory.scheduler
    if scheduler.config.get("prediction_type", "flow_prediction") == "flow_prediction":
        index = scheduler.begin_index + trajectory.step
        return x - scheduler.sigmas[index].to(x.dtype) * prediction  # type: ignore[no-any-return]
    signal = scheduler.alphas_cumprod[round(float(trajectory.timestep))].float() ** 0.5
    noise = (1 - signal**2) ** 0.5
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return signal * x - noise * prediction  # type: ignore[no-any-return]
    if kind == "sample":
        return prediction
    return (x - noise * prediction) / signal.clamp(min=1e-3)  # type: ignore[no-any-return]
