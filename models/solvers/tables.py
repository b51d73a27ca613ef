"""A scheduler as numbers: what each step does to the latents, read off diffusers' own class.

Every scheduler offered here is a linear multistep method (k-diffusion's samplers; DPM-Solver++, Lu et al. 2022; UniPC,
Zhao et al. 2023): a step is linear in the sample, in what the scheduler keeps between steps, in the model output and in
the noise. With these in *registers* s, the first of which is the sample, a step is s' = M s + b m + c z. No coefficient
is written here: a step of the scheduler itself, taken on basis vectors, shows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.solvers.names import NoiseSchedule
from models.solvers.probe import (
    TOLERANCE,
    NotLinear,
    Step,
    drawn_noise,
    fresh_generator,
    model_input,
    probe,
    take_step,
)

CACHED_TABLES = 128
"""Tables kept. One takes (R² + 2R + 6) · 8 bytes a step: 0.2 to 6 kB for 25 steps."""


@dataclass(frozen=True, eq=False)
class Table:
    """A prepared scheduler's whole run as a linear recurrence over R registers; CPU tensors in float64.

    The registers start as the first latents and R - 1 times zero.
    """

    coefficients: Tensor
    """[steps, R, R + 2]: what makes each register's next value: the R registers, the model output, the noise."""
    draws: tuple[bool, ...]
    """Whether the scheduler draws noise in that step, even where the noise's coefficient is zero."""
    timesteps: Tensor
    """[steps]: the time that the network is told."""
    input_scale: Tensor
    """[steps]: the network is given the sample times this."""
    preview: Tensor
    """[steps, 2]: how much of the sample before the step and of the model output make the clean latents foretold."""
    init_noise_sigma: float
    """The standard deviation of the noise that a run from text begins with."""
    levels: Tensor
    """[steps + 1, 2]: how much of clean latents and of unit noise make the sample that a step is given, or, in the end,
    the result. A run from an image begins with the first."""

    @property
    def add_noise(self) -> tuple[float, float]:
        """How much of the encoded image and of unit noise make the latents that a run from an image begins with."""
        signal, noise = self.levels[0].tolist()
        return signal, noise

    @property
    def registers(self) -> int:
        """R: one latents-sized tensor each."""
        return self.coefficients.shape[1]

    @cached_property
    def host(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """For packing: the coefficients, and [steps, 6] of time, scale of the input, preview, and the level of the
        sample after the step; as arrays.

        Looking a number up in a tensor would be an operator to dispatch.
        """
        times = [self.timesteps[:, None], self.input_scale[:, None]]
        scalars = torch.cat([*times, self.preview, self.levels[1:]], dim=1)
        return self.coefficients.numpy(), scalars.numpy()

    def __len__(self) -> int:
        """Evaluations of the network in the whole run."""
        return len(self.coefficients)


def table(schedule: NoiseSchedule) -> Table:
    """The table of a prepared schedule, shared between schedules of equal content.

    Raises `NotLinear` where the scheduler has to take its own step.
    """
    found = _table(_Content(schedule))
    if isinstance(found, str):
        raise NotLinear(found)
    return found


class _Content:
    """A schedule as a cache key, equal where class, config, times, noise levels and beginning are."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        scheduler = schedule.scheduler
        config = tuple((k, str(_plain(v))) for k, v in sorted(scheduler.config.items()) if not k.startswith("_"))
        levels = tuple(getattr(scheduler, "sigmas", torch.empty(0)).tolist())
        times = (tuple(scheduler.timesteps.tolist()), tuple(schedule.timesteps.tolist()), schedule.begin)
        self.schedule = schedule
        self.content = (type(scheduler), config, scheduler.num_inference_steps, times, levels)

    def __hash__(self) -> int:
        return hash(self.content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Content) and other.content == self.content


def _plain(value: Any) -> Any:
    """A config's value whose text says all of it: numpy shortens that of a long array."""
    return value.tolist() if hasattr(value, "tolist") else value


@lru_cache(maxsize=CACHED_TABLES)
def _table(content: _Content) -> Table | str:
    """A table, or why there is none: refusals are worth remembering too."""
    try:
        return _read(content.schedule)
    except NotLinear as error:
        return str(error)


@torch.inference_mode(False)
@torch.no_grad()
def _read(schedule: NoiseSchedule) -> Table:
    scheduler, steps = schedule.fresh(), []
    for t in schedule.timesteps:
        scheduler, step = probe(scheduler, t)
        steps.append(step)
    result = Table(
        coefficients=_compact(steps),
        draws=tuple(step.noise_dtype is not None for step in steps),
        timesteps=schedule.timesteps.double(),
        input_scale=torch.tensor([step.input_scale for step in steps], dtype=torch.float64),
        preview=torch.tensor([step.preview for step in steps], dtype=torch.float64),
        init_noise_sigma=float(getattr(schedule.scheduler, "init_noise_sigma", 1.0)),
        levels=torch.tensor([*(step.level for step in steps), (1.0, 0.0)], dtype=torch.float64),
    )
    _verify(schedule, result, [step.noise_dtype for step in steps])
    return result


def _compact(steps: Sequence[Step]) -> Tensor:
    """Coefficients [steps, R, R + 2] over the registers that some later sample depends on; the rest is dropped."""
    needed = [[0]]  # by step, last first: which registers matter
    for step in reversed(steps):
        read = (step.matrix[needed[-1]] != 0).any(dim=0)  # a NaN counts as read
        needed.append(sorted({0, *read.nonzero().flatten().tolist()}))
    needed.reverse()
    size = max(map(len, needed))
    coefficients = torch.zeros(len(steps), size, size + 2, dtype=torch.float64)
    for n, step in enumerate(steps):
        before, after = needed[n], needed[n + 1]
        coefficients[n, : len(after), : len(before)] = step.matrix[after][:, before]
        coefficients[n, : len(after), size] = step.output[after]
        coefficients[n, : len(after), size + 1] = step.noise[after]
    return coefficients


def _verify(schedule: NoiseSchedule, result: Table, noise_dtypes: Sequence[torch.dtype | None]) -> None:
    """Compare every step with the scheduler's own on random inputs, of the usual size and of one that any clip meets.

    Raises `NotLinear`. Each step starts from the scheduler's own sample; the other registers are the table's.
    """
    name = type(schedule.scheduler).__name__
    if not torch.isfinite(result.coefficients).all():
        raise NotLinear(f"{name} has coefficients that are not finite")
    generator, shape = fresh_generator(), (2, 2, 3, 4)
    sizes = torch.tensor([1.0, 1e6], dtype=torch.float64).reshape(2, 1, 1, 1)
    scheduler, state = schedule.fresh(), torch.zeros(2, result.registers, *shape[1:], dtype=torch.float64)
    state[:, 0] = sizes[:, 0] * torch.randn(shape, generator=generator, dtype=torch.float64)
    for t, coefficients, dtype in zip(schedule.timesteps, result.coefficients, noise_dtypes, strict=True):
        sample = state[:, 0].clone()
        output = sizes * torch.randn(shape, generator=generator, dtype=torch.float64)
        noise = torch.zeros_like(sample) if dtype is None else drawn_noise(shape, dtype)
        model_input(scheduler, sample, t)
        stepped = take_step(scheduler, output, t, sample, fresh_generator()).double()
        operands = torch.cat([state, output[:, None], noise[:, None]], dim=1)  # [2, R + 2, ...]
        state = torch.einsum("ij,bjchw->bichw", coefficients, operands)
        terms = torch.einsum("j,bjchw->bchw", coefficients[0].abs(), operands.abs()).amax((1, 2, 3))
        if not ((stepped - state[:, 0]).abs().amax((1, 2, 3)) <= TOLERANCE * terms).all():
            raise NotLinear(f"{name} takes a step at time {float(t):g} that is not linear: does it clip or threshold?")
        state[:, 0] = stepped
