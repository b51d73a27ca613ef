"""The heart: one backbone forward and one scheduler step for every trajectory of a tick."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.conditioning import stack
from models.plan import Role
from models.rows import Row
from models.trajectory import Trajectory

if TYPE_CHECKING:
    from models.backbone import Backbone


@torch.inference_mode()
def advance(backbone: Backbone, trajectories: Sequence[Trajectory]) -> None:
    """Advance trajectories of one group by one step each, whatever each of their plans asks for.

    An exception in the forward leaves every trajectory at its step, so that the tick can be tried again in parts.
    """
    predictions = predict(backbone, [(row, trajectory) for trajectory in trajectories for row in trajectory.rows()])
    for trajectory in trajectories:
        trajectory.advance(predictions[trajectory])


def predict(backbone: Backbone, rows: Sequence[tuple[Row, Trajectory]]) -> dict[Trajectory, dict[Role, Tensor]]:
    """One forward over rows of one group; the prediction [1, channels, h, w] of each trajectory's rows by role."""
    rows = sorted(rows, key=lambda pair: backbone.network.order(pair[0]))
    inputs = {trajectory: trajectory.model_input() for _, trajectory in rows}
    x = torch.cat([inputs[trajectory] for _, trajectory in rows])  # [rows, channels, h, w]
    t = _times([float(trajectory.timestep) for _, trajectory in rows], x.device)
    conditioning = stack([trajectory.conditioning[row.role] for row, trajectory in rows])
    out = backbone.forward(x, t, conditioning, [row for row, _ in rows])
    predictions: dict[Trajectory, dict[Role, Tensor]] = {trajectory: {} for _, trajectory in rows}
    for i, (row, trajectory) in enumerate(rows):
        predictions[trajectory][row.role] = out[i : i + 1]
    return predictions


def _times(values: list[float], device: torch.device) -> Tensor:
    """Times [rows] on the device, without waiting for it."""
    t = torch.tensor(values)
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)
