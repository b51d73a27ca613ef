"""One step for all trajectories of a tick, whatever their schedulers: the same few operators for one and for many.

`pack` gathers a tick's numbers on the host and uploads them once; `stack`, `model_input`, `step` and `preview` use them
on the device without waiting for it. Sums are taken term by term in one order, so that a trajectory's result depends
neither on its neighbours nor on how many there are; a matrix product would promise neither, nor float32 on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from models.masks import Outside, blend
from models.solvers.tables import Table


@dataclass(frozen=True, slots=True)
class Move:
    """What one trajectory does in a tick: a step of its table along a weighted sum of predictions."""

    table: Table
    step: int
    predictions: tuple[tuple[int, float], ...]
    """(row among the tick's predictions, weight) of each role; guidance of scale s weighs s and 1 - s."""
    registers: int
    """How many registers its state holds: the table's, or more after a tick with a trajectory that has more."""
    masked: bool = False
    """Whether its latents outside a mask follow a picture."""

    @property
    def draws(self) -> bool:
        """Whether the step takes noise."""
        return self.table.draws[self.step]


@dataclass(frozen=True, slots=True)
class Packed:
    """The numbers of a tick on its device, in the state's dtype. R is the most registers of any of its tables."""

    coefficients: Tensor
    """[trajectories, R, R + 2], as in `Table`."""
    weights: Tensor
    """[trajectories, roles]: of the predictions; zero where a trajectory has fewer roles."""
    rows: Tensor
    """[trajectories, roles], integers: which prediction."""
    owners: Tensor
    """[predictions], integers: the trajectory of each prediction; repeats a model input for each role."""
    sources: Tensor | None
    """[trajectories · R], integers: the registers among all that the states hold; None where each holds R."""
    timesteps: Tensor
    """[trajectories]: the time that the network is told."""
    input_scale: Tensor
    """[trajectories]"""
    preview: Tensor
    """[trajectories, 2], as in `Table`: of the sample and of the prediction."""
    levels: Tensor
    """[trajectories, 2], as in `Table`: of the samples after the step."""
    masked: Tensor | None
    """[masked trajectories], integers; None where all of them are, or none."""
    draws: bool
    """Whether any step takes noise."""


def pack(moves: Sequence[Move], dtype: torch.dtype, device: torch.device) -> Packed:
    """A tick's numbers, uploaded once: from pinned memory on a GPU, and without waiting.

    `dtype` is the state's: float32, or float64. The coefficients are rounded to it here and not before.
    """
    real, whole = (np.float64, np.int64) if dtype == torch.float64 else (np.float32, np.int32)
    count, size = len(moves), max(move.table.registers for move in moves)
    roles = max(len(move.predictions) for move in moves)
    coefficients = np.zeros((count, size, size + 2), real)
    weights, rows = np.zeros((count, roles), real), np.empty((count, roles), whole)
    owners = np.empty(1 + max(row for move in moves for row, _ in move.predictions), whole)
    sources, held = np.empty((count, size), whole), 0
    scalars = np.empty((6, count), real)  # time, scale of the input, preview, level after the step
    masked = np.array([i for i, move in enumerate(moves) if move.masked], whole)
    for i, move in enumerate(moves):
        numbers, own = move.table.host[0][move.step], move.table.registers
        coefficients[i, :own, :own] = numbers[:, :own]
        coefficients[i, :own, size:] = numbers[:, own:]
        rows[i] = move.predictions[0][0]  # what a missing role reads, with weight zero
        for role, (row, weight) in enumerate(move.predictions):
            rows[i, role], weights[i, role], owners[row] = row, weight, i
        sources[i] = held  # what a missing register reads, with coefficient zero
        sources[i, :own] += np.arange(own, dtype=whole)
        held += move.registers
        scalars[:, i] = move.table.host[1][move.step]
    # Integers travel as the bits of reals of their size, so that there is one tensor to upload.
    integers = [rows.view(real), owners.view(real), sources.view(real), masked.view(real)]
    blocks = [coefficients, weights, scalars, *integers]
    sent = torch.from_numpy(np.concatenate([block.ravel() for block in blocks]))
    if device.type == "cuda":
        sent = sent.pin_memory()
    parts = torch.split_with_sizes(sent.to(device, non_blocking=True), [block.size for block in blocks])
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    return Packed(
        coefficients=parts[0].view(count, size, size + 2),
        weights=parts[1].view(count, roles),
        rows=parts[3].view(integer).view(count, roles),
        owners=parts[4].view(integer),
        sources=None if all(move.registers == size for move in moves) else parts[5].view(integer),
        timesteps=parts[2][:count],
        input_scale=parts[2][count : 2 * count],
        preview=parts[2][2 * count : 4 * count].view(2, count).t(),
        levels=parts[2][4 * count :].view(2, count).t(),
        masked=parts[6].view(integer).long() if 0 < len(masked) < count else None,
        draws=any(move.draws for move in moves),
    )


def first_state(latents: Tensor, registers: int) -> Tensor:
    """The state [registers, channels, h, w] of a trajectory about to begin from latents [1, channels, h, w]."""
    return pad(latents, (0, 0, 0, 0, 0, 0, 0, registers - 1))


def stack(states: Sequence[Tensor], packed: Packed) -> Tensor:
    """States [registers, channels, h, w] of one shape, each of its own number of registers, as one of R each.

    Returns [trajectories, R, channels, h, w].
    """
    if packed.sources is None:
        return torch.stack(tuple(states))
    registers = torch.cat(tuple(states)).index_select(0, packed.sources)
    return registers.view(*packed.coefficients.shape[:2], *states[0].shape[1:])


def model_input(state: Tensor, input_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The samples of a state [trajectories, R, channels, h, w] as the network wants them.

    `input_scale` is [trajectories]; returns [trajectories, channels, h, w] in the network's dtype.
    """
    return _weighted_sum([state[:, 0]], [input_scale]).to(dtype)


def combine(predictions: Tensor, packed: Packed, channels: int) -> Tensor:
    """Each trajectory's weighted sum of its roles' predictions [predictions, channels or twice as many, h, w].

    The second half of the channels is a learned variance, which these schedulers do not use. Returns
    [trajectories, channels, h, w] in the state's dtype.
    """
    if predictions.shape[1] == 2 * channels:
        predictions = predictions[:, :channels]
    rows, weights = packed.rows.t(), packed.weights.t()  # [roles, trajectories]
    by_role = predictions.index_select(0, rows.reshape(-1)).view(*rows.shape, *predictions.shape[1:])
    return _weighted_sum(by_role.to(weights.dtype).unbind(), weights.unbind())


def step(state: Tensor, prediction: Tensor, packed: Packed, noise: Tensor | None = None) -> Tensor:
    """Every trajectory's next state, [trajectories, R, channels, h, w] like the state given, which stays as it is.

    `prediction` [trajectories, channels, h, w] is what `combine` gave. `noise` of the same shape is what `draw_noise`
    drew; a `ValueError` says that it is missing.
    """
    if packed.draws and noise is None:
        raise ValueError("a scheduler of this tick draws noise, and none is given")
    operands = [*state.unbind(1), prediction]
    operands += [] if noise is None else [noise]
    terms = [operand[:, None] for operand in operands]  # R + 2 of [trajectories, 1, channels, h, w]
    return _weighted_sum(terms, packed.coefficients.unbind(2))


def hold(state: Tensor, packed: Packed, outsides: Sequence[Outside]) -> Tensor:
    """States [trajectories, R, channels, h, w] after a step, with the samples of masked ones as their pictures outside.

    `outsides` are those of the masked trajectories, in order. The state given is written over.
    """
    clean, noise, inside = (torch.cat([getattr(o, name) for o in outsides]) for name in ("clean", "noise", "inside"))
    levels = packed.levels if packed.masked is None else packed.levels.index_select(0, packed.masked)
    original = _weighted_sum([clean, noise], levels.unbind(1))
    samples = state[:, 0]
    if packed.masked is None:
        samples.copy_(blend(samples, original, inside))
    else:
        samples.index_copy_(0, packed.masked, blend(samples.index_select(0, packed.masked), original, inside))
    return state


def preview(state: Tensor, prediction: Tensor, packed: Packed) -> Tensor:
    """The clean latents that the predictions point to, [trajectories, channels, h, w]; the state before the step."""
    return _weighted_sum([state[:, 0], prediction], packed.preview.unbind(1))


def draw_noise(
    moves: Sequence[Move],
    generators: Sequence[torch.Generator],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """The noise of a tick, [trajectories, *shape] with shape [channels, h, w], uploaded once; None where none is drawn.

    Each CPU generator gives what diffusers' step would have drawn, so that one may stand in for the other at any step.
    """
    if not any(move.draws for move in moves):
        return None
    noise = torch.zeros(len(moves), *shape, dtype=dtype, pin_memory=device.type == "cuda")
    for i, (move, generator) in enumerate(zip(moves, generators, strict=True)):
        if move.draws:
            noise[i].normal_(generator=generator)
    return noise.to(device, non_blocking=True)


def _weighted_sum(operands: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Σ weight · operand, term after term; a weight is one number to each of the operand's leading indices.

    Weights without an operand are left out.
    """
    (operand, weight), *rest = zip(operands, weights, strict=False)
    total = operand * weight[..., None, None, None]
    for operand, weight in rest:
        total.addcmul_(operand, weight[..., None, None, None])
    return total
