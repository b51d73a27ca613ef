"""A scheduler as numbers: what each step does to the latents, read off diffusers' own class.

Every scheduler offered here is a linear multistep method (k-diffusion's samplers; DPM-Solver++, Lu et al. 2022; UniPC,
Zhao et al. 2023): a step is linear in the sample, in what the scheduler keeps between steps, in the model output and in
the noise. With these in *registers* s, the first of which is the sample, a step is s' = M s + b m + c z. No coefficient
is written here: a step of the scheduler itself, taken on basis vectors, shows them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.solvers.names import NoiseSchedule, takes

CACHED_TABLES = 128
"""Tables kept. One takes (R² + 2R + 4) · 8 bytes a step: 0.2 to 6 kB for 25 steps."""

TOLERANCE = 1e-5
"""How far the scheduler's step may be from its table's, relative to its largest terms; float32 alone makes 1e-7."""


class NotLinear(Exception):
    """A scheduler whose step is not linear: it clips or thresholds, or its coefficients are not finite."""


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
    add_noise: tuple[float, float]
    """How much of the encoded image and of unit noise make the latents that a run from an image begins with."""

    @property
    def registers(self) -> int:
        """R: one latents-sized tensor each."""
        return self.coefficients.shape[1]

    @cached_property
    def host(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """For packing: the coefficients, and [steps, 4] of time, scale of the input, and preview; as arrays.

        Looking a number up in a tensor would be an operator to dispatch.
        """
        scalars = torch.cat([self.timesteps[:, None], self.input_scale[:, None], self.preview], dim=1)
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
        scheduler, step = _probe(scheduler, t)
        steps.append(step)
    first = schedule.fresh()
    result = Table(
        coefficients=_compact(steps),
        draws=tuple(step.noise_dtype is not None for step in steps),
        timesteps=schedule.timesteps.double(),
        input_scale=torch.tensor([step.input_scale for step in steps], dtype=torch.float64),
        preview=torch.tensor([step.preview for step in steps], dtype=torch.float64),
        init_noise_sigma=float(getattr(first, "init_noise_sigma", 1.0)),
        add_noise=_noised(first, schedule.timesteps[0]),
    )
    _verify(schedule, result, [step.noise_dtype for step in steps])
    return result


@dataclass(frozen=True)
class _Step:
    """One step as it was read: the registers are the sample and all that the scheduler keeps, needed later or not."""

    matrix: Tensor  # [registers after, registers before]
    output: Tensor  # [registers after]
    noise: Tensor  # [registers after]
    noise_dtype: torch.dtype | None  # of the numbers drawn; None where the step draws none
    input_scale: float
    preview: tuple[float, float]


def _probe(scheduler: Any, t: Tensor) -> tuple[Any, _Step]:
    """Read one step off a scheduler; returns it also as it is after the step. The one given stays as it is.

    The sample, each tensor that the scheduler keeps and the model output are basis vectors, so that the results are
    rows of coefficients. Where the step draws noise, the same step on zeros shows the noise alone.
    """
    before = 1 + len(_kept(scheduler))
    # Wide enough that float32 and float64 noise are different numbers: torch draws under 16 of them in one way.
    basis = torch.eye(before + 1, before + 16, dtype=torch.float64)
    after, rows, drew = _stepped(scheduler, t, basis)
    noise, dtype = torch.zeros(len(rows), dtype=torch.float64), None
    if drew:
        _, bare, _ = _stepped(scheduler, t, torch.zeros_like(basis))
        noise, dtype = _noise(bare)
        rows = rows - bare
    matrix = rows[:, : before + 1]
    ready = _copy(scheduler)
    scale = float(_model_input(ready, torch.ones(1, 1, 1, 1, dtype=torch.float64), t))
    preview = _preview(scheduler.config.get("prediction_type", "flow_prediction"), *_noised(ready, t))
    return after, _Step(matrix[:, :-1], matrix[:, -1], noise, dtype, scale, preview)


def _stepped(scheduler: Any, t: Tensor, vectors: Tensor) -> tuple[Any, Tensor, bool]:
    """A step from vectors [registers + 1, width], the last as model output, by a copy of the scheduler.

    Returns the copy, the registers after the step [registers after, width], and whether it drew noise.
    """
    after = _copy(scheduler)
    sample, *kept, output = vectors[:, None, None, None].clone().unbind()  # [1, 1, 1, width] each
    for (holder, key), value in zip(_kept(after), kept, strict=True):
        holder[key] = value
    _model_input(after, sample, t)  # some schedulers warn about a step without it
    generator = _generator()
    idle = generator.get_state()
    stepped = _step(after, output, t, sample, generator)
    rows = [stepped, *(holder[key] for holder, key in _kept(after))]
    drew = not torch.equal(idle, generator.get_state())
    return after, torch.stack([row.double().flatten() for row in rows]), drew


def _kept(scheduler: Any) -> list[tuple[Any, Any]]:
    """Where a scheduler keeps tensors of the latents' shape between steps, as (holder, key): the other registers.

    Schedules have one dimension, latents four. Whatever were kept elsewhere would show when the table is verified.
    """
    places: list[tuple[Any, Any]] = []
    for name, value in vars(scheduler).items():
        if _is_latents(value):
            places.append((vars(scheduler), name))
        elif isinstance(value, list):
            places.extend((value, i) for i, item in enumerate(value) if _is_latents(item))
    return places


def _is_latents(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4


def _copy(scheduler: Any) -> Any:
    """A scheduler of its own to step, sharing the schedules, which a step only reads."""
    own = copy.copy(scheduler)
    vars(own).update({name: list(value) for name, value in vars(own).items() if isinstance(value, list)})
    return own


def _generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def _step(scheduler: Any, output: Tensor, t: Tensor, sample: Tensor, generator: torch.Generator) -> Tensor:
    options = dict(takes(scheduler.__class__))
    if "generator" in options:
        options["generator"] = generator
    stepped: Tensor = scheduler.step(output, t, sample, **options, return_dict=False)[0]
    return stepped


def _model_input(scheduler: Any, sample: Tensor, t: Tensor) -> Tensor:
    """The sample as the network wants it; flow matching takes it as it is."""
    return scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample


def _noised(scheduler: Any, t: Tensor) -> tuple[float, float]:
    """(a, b) of the scheduler's samples a · clean + b · noise at its coming step, whose time is t."""
    clean, noise = torch.eye(2, dtype=torch.float64)[:, None, None, None].unbind()  # [1, 1, 1, 2]
    if hasattr(scheduler, "add_noise"):
        noised = scheduler.add_noise(clean, noise, t[None])
    else:
        noised = scheduler.scale_noise(clean, t[None], noise)
    a, b = noised.flatten().tolist()
    return a, b


def _preview(prediction_type: str, a: float, b: float) -> tuple[float, float]:
    """(α, β) of the clean latents α · sample + β · prediction, where the sample is a · clean + b · noise.

    This is what the prediction types mean: noise; v = cos φ · noise - sin φ · clean with tan φ = b / a (Salimans & Ho,
    2022); noise - clean for flow matching; the clean latents. Where the sample is all noise, the noise says nothing of
    the clean latents, and the division is bounded.
    """
    radius = (a * a + b * b) ** 0.5
    if prediction_type == "epsilon":
        signal = max(a, 1e-3 * radius)
        return 1 / signal, -b / signal
    if prediction_type == "v_prediction":
        return a / radius**2, -b / radius
    if prediction_type == "flow_prediction":
        return 1 / (a + b), -b / (a + b)
    if prediction_type in ("sample", "original_sample"):
        return 0.0, 1.0
    raise NotLinear(f"the prediction type {prediction_type} is not known here")


def _noise(bare: Tensor) -> tuple[Tensor, torch.dtype]:
    """The noise's coefficient in each register, and the dtype drawn, from a step on zeros [registers, width]."""
    for dtype in (torch.float64, torch.float32):
        drawn = _drawn((1, 1, 1, bare.shape[1]), dtype).flatten()
        coefficients = bare @ drawn / (drawn @ drawn)
        if torch.allclose(coefficients[:, None] * drawn, bare, rtol=TOLERANCE, atol=1e-12):
            return coefficients, dtype
    raise NotLinear("the noise drawn is not that of diffusers' `randn_tensor`")


def _drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The noise that a step draws from a fresh generator."""
    return torch.randn(shape, generator=_generator(), dtype=dtype).double()


def _compact(steps: Sequence[_Step]) -> Tensor:
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
    generator, shape = _generator(), (2, 2, 3, 4)
    sizes = torch.tensor([1.0, 1e6], dtype=torch.float64).reshape(2, 1, 1, 1)
    scheduler, state = schedule.fresh(), torch.zeros(2, result.registers, *shape[1:], dtype=torch.float64)
    state[:, 0] = sizes[:, 0] * torch.randn(shape, generator=generator, dtype=torch.float64)
    for t, coefficients, dtype in zip(schedule.timesteps, result.coefficients, noise_dtypes, strict=True):
        sample = state[:, 0].clone()
        output = sizes * torch.randn(shape, generator=generator, dtype=torch.float64)
        noise = torch.zeros_like(sample) if dtype is None else _drawn(shape, dtype)
        _model_input(scheduler, sample, t)
        stepped = _step(scheduler, output, t, sample, _generator()).double()
        operands = torch.cat([state, output[:, None], noise[:, None]], dim=1)  # [2, R + 2, ...]
        state = torch.einsum("ij,bjchw->bichw", coefficients, operands)
        terms = torch.einsum("j,bjchw->bchw", coefficients[0].abs(), operands.abs()).amax((1, 2, 3))
        if not ((stepped - state[:, 0]).abs().amax((1, 2, 3)) <= TOLERANCE * terms).all():
            raise NotLinear(f"{name} takes a step at time {float(t):g} that is not linear: does it clip or threshold?")
        state[:, 0] = stepped
