"""Noise schedulers by the name a request gives: diffusers' own, one instance a trajectory, tables on the CPU."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from models.errors import OutOfRange, RequestError
from models.solvers.flow import FLOW_REGISTRY, FlowTimes, is_flow, prepared

REGISTRY: dict[str, tuple[type, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "pndm": (PNDMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "heun": (HeunDiscreteScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
}
WARPABLE = {
    "ddim": {"algorithm_type": "dpmsolver++", "solver_order": 1, "final_sigmas_type": "zero"},
    "dpmpp_2m": {},
}
"""Schedulers that take time steps of any spacing, as options of DPM-Solver++; DDIM is its first order."""


def supported(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The schedulers that can honour a model's noise schedule: with zero terminal SNR or flow matching not all can."""
    if is_flow(config):
        return tuple(FLOW_REGISTRY)
    if not config.get("rescale_betas_zero_snr"):
        return tuple(REGISTRY)
    return tuple(n for n, (cls, _) in REGISTRY.items() if "rescale_betas_zero_snr" in inspect.signature(cls).parameters)


def default_name(config: Mapping[str, Any]) -> str:
    """The registry's name of the scheduler a pipeline came with; the simplest where it is none of them."""
    flow = is_flow(config)
    known = FLOW_REGISTRY if flow else {n: entry for n, entry in REGISTRY.items() if not entry[1]}
    names = (n for n, (cls, _) in known.items() if cls.__name__ == config.get("_class_name"))
    return next(names, "euler" if flow else "ddim")


@dataclass(frozen=True)
class NoiseSchedule:
    """A scheduler ready to run: `scheduler` has its time steps set, `timesteps` [steps] are those to evaluate (CPU).

    With image-to-image the run begins part of the way in: `begin` is the scheduler's index of the first.
    """

    scheduler: Any
    timesteps: Tensor
    begin: int

    @cached_property
    def times(self) -> tuple[float, ...]:
        """The time steps as plain numbers."""
        return tuple(self.timesteps.tolist())

    def fresh(self) -> Any:
        """A scheduler of one trajectory's own."""
        return copy.deepcopy(self.scheduler)


def noise_schedule(
    name: str,
    config: Mapping[str, Any],
    num_inference_steps: int,
    strength: float = 1.0,
    warp: float = 1.0,
    flow: FlowTimes | None = None,
    tokens: int = 0,
) -> NoiseSchedule:
    """The schedule of a run, shared between runs that are alike. With `flow` it depends on the image's `tokens`.

    Raises a `RequestError` for a step count or a warp that the scheduler cannot do, and a strength that leaves no step.
    """
    if flow is not None:
        return _flow_schedule(name, _Frozen(config), num_inference_steps, strength, warp, flow, tokens)
    return _noise_schedule(name, _Frozen(config), num_inference_steps, strength, warp)


class _Frozen:
    """A config as a cache key: compared by identity, which is the model's for its whole life."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def __hash__(self) -> int:
        return id(self.config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and other.config is self.config


@lru_cache(maxsize=512)
def _noise_schedule(
    name: str, frozen: _Frozen, num_inference_steps: int, strength: float, warp: float
) -> NoiseSchedule:
    cls, options = REGISTRY[name]
    try:
        if warp == 1.0:
            scheduler = cls.from_config(frozen.config, **options)  # type: ignore[attr-defined]
            scheduler.set_timesteps(num_inference_steps)
        else:
            if name not in WARPABLE:
                reason = f"{name} takes no custom time steps; these do: {', '.join(WARPABLE)}"
                raise RequestError("timestep_warp", reason)
            scheduler = DPMSolverMultistepScheduler.from_config(frozen.config, **WARPABLE[name])
            steps = warped_timesteps(num_inference_steps, warp, scheduler.config.num_train_timesteps)
            scheduler.set_timesteps(timesteps=steps)
            num_inference_steps = len(steps)
    except (ValueError, IndexError) as error:
        if isinstance(error, RequestError):
            raise
        raise OutOfRange("num_inference_steps", f"{name} cannot take {num_inference_steps} steps: {error}") from error
    skipped = max(num_inference_steps - min(int(num_inference_steps * strength), num_inference_steps), 0)
    return _from(scheduler, skipped * scheduler.order, strength, num_inference_steps)


@lru_cache(maxsize=512)
def _flow_schedule(
    name: str, frozen: _Frozen, num_inference_steps: int, strength: float, warp: float, flow: FlowTimes, tokens: int
) -> NoiseSchedule:
    if warp != 1.0:
        raise RequestError("timestep_warp", "a model of flow matching takes no custom time steps")
    scheduler = prepared(name, frozen.config, num_inference_steps, flow, tokens)
    # Other pipelines round the steps that are run, these the steps that are left out.
    skipped = int(max(num_inference_steps - num_inference_steps * strength, 0))
    return _from(scheduler, skipped, strength, num_inference_steps)


def _from(scheduler: Any, begin: int, strength: float, num_inference_steps: int) -> NoiseSchedule:
    timesteps = scheduler.timesteps[begin:]
    if not len(timesteps):
        raise OutOfRange("strength", f"{strength:g} of {num_inference_steps} steps leaves none to run")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return NoiseSchedule(scheduler, timesteps, begin)


@lru_cache(maxsize=32)
def takes(cls: type) -> Mapping[str, Any]:
    """The options of a scheduler's step: no extra noise for DDIM, a generator where it draws any (filled in later)."""
    parameters = inspect.signature(cls.step).parameters  # type: ignore[attr-defined]
    options: dict[str, Any] = {"eta": 0.0} if "eta" in parameters else {}
    return options | ({"generator": None} if "generator" in parameters else {})


def warped_timesteps(count: int, gamma: float, num_train_timesteps: int = 1000, margin: float = 30.0) -> list[int]:
    """Time steps, noisy first, leaning to the noisy end for `gamma` < 1 and to the clean end for `gamma` > 1.

    Kim et al. (ACCV 2024): t = linspace(0, T, n), T = train steps - 1, on a power curve whose ends `margin` moves.
    Steps that coincide after rounding are taken once.
    """
    if not math.isfinite(gamma) or gamma <= 0:
        raise OutOfRange("timestep_warp", f"{gamma} is not above 0")
    last = num_train_timesteps - 1
    power = gamma if gamma >= 1 else 1 / gamma
    low, high = (0.0, last + margin * (power - 1)) if gamma >= 1 else (margin * (1 - power), float(last))
    t = torch.linspace(0, last, count, dtype=torch.float64)
    curve = (((t - low) / (high - low)) ** gamma).clamp(0, 1) * last
    return sorted({int(v) for v in curve.floor()}, reverse=True)
