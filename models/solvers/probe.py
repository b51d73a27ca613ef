"""One step of a diffusers scheduler as numbers, read off the scheduler itself on basis vectors."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.solvers.names import takes

TOLERANCE = 1e-5
"""How far the scheduler's step may be from its table's, relative to its largest terms; float32 alone makes 1e-7."""


class NotLinear(Exception):
    """A scheduler whose step is not linear: it clips or thresholds, or its coefficients are not finite."""


@dataclass(frozen=True)
class Step:
    """One step as it was read: the registers are the sample and all that the scheduler keeps, needed later or not."""

    matrix: Tensor  # [registers after, registers before]
    output: Tensor  # [registers after]
    noise: Tensor  # [registers after]
    noise_dtype: torch.dtype | None  # of the numbers drawn; None where the step draws none
    input_scale: float
    preview: tuple[float, float]
    level: tuple[float, float]


def probe(scheduler: Any, t: Tensor) -> tuple[Any, Step]:
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
    scale = float(model_input(ready, torch.ones(1, 1, 1, 1, dtype=torch.float64), t))
    level = noised(ready, t)
    preview = _preview(scheduler.config.get("prediction_type", "flow_prediction"), *level)
    return after, Step(matrix[:, :-1], matrix[:, -1], noise, dtype, scale, preview, level)


def _stepped(scheduler: Any, t: Tensor, vectors: Tensor) -> tuple[Any, Tensor, bool]:
    """A step from vectors [registers + 1, width], the last as model output, by a copy of the scheduler.

    Returns the copy, the registers after the step [registers after, width], and whether it drew noise.
    """
    after = _copy(scheduler)
    sample, *kept, output = vectors[:, None, None, None].clone().unbind()  # [1, 1, 1, width] each
    for (holder, key), value in zip(_kept(after), kept, strict=True):
        holder[key] = value
    model_input(after, sample, t)  # some schedulers warn about a step without it
    generator = fresh_generator()
    idle = generator.get_state()
    stepped = take_step(after, output, t, sample, generator)
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


def fresh_generator() -> torch.Generator:
    """Always the same one, on the CPU."""
    return torch.Generator("cpu").manual_seed(0)


def take_step(scheduler: Any, output: Tensor, t: Tensor, sample: Tensor, generator: torch.Generator) -> Tensor:
    """The scheduler's own next sample."""
    options = dict(takes(scheduler.__class__))
    if "generator" in options:
        options["generator"] = generator
    stepped: Tensor = scheduler.step(output, t, sample, **options, return_dict=False)[0]
    return stepped


def model_input(scheduler: Any, sample: Tensor, t: Tensor) -> Tensor:
    """The sample as the network wants it; flow matching takes it as it is."""
    return scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample


def noised(scheduler: Any, t: Tensor) -> tuple[float, float]:
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
        drawn = drawn_noise((1, 1, 1, bare.shape[1]), dtype).flatten()
        coefficients = bare @ drawn / (drawn @ drawn)
        if torch.allclose(coefficients[:, None] * drawn, bare, rtol=TOLERANCE, atol=1e-12):
            return coefficients, dtype
    raise NotLinear("the noise drawn is not that of diffusers' `randn_tensor`")


def drawn_noise(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The noise that a step draws from a fresh generator."""
    return torch.randn(shape, generator=fresh_generator(), dtype=dtype).double()
