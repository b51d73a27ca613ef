"""The heart: one backbone forward and one scheduler step for every trajectory of a tick."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.trajectory import Trajectory

if TYPE_CHECKING:
    from models.backbones.base import Backbone


@torch.inference_mode()
def advance(backbone: Backbone, trajectories: Sequence[Trajectory]) -> None:
    """Advance trajectories of one group by one step each, whatever each of their plans asks for.

    An exception in the forward leaves every trajectory as it was, so that the same tick can be tried again in parts.
    """
    rows = [(row, trajectory) for trajectory in trajectories for row in trajectory.rows()]
    rows.sort(key=lambda pair: backbone.network.order(pair[0]))
    inputs = {trajectory: trajectory.model_input() for trajectory in trajectories}
    x = torch.cat([inputs[trajectory] for _, trajectory in rows])  # [rows, channels, h, w]
    t = _times([float(trajectory.timestep) for _, trajectory in rows], x.device)
    parts = [trajectory.conditioning[row.role] for row, trajectory in rows]
    conditioning = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    predictions = backbone.forward(x, t, conditioning, [row for row, _ in rows])
    place = {(trajectory, row.role): i for i, (row, trajectory) in enumerate(rows)}
    for trajectory in trajectories:
        first, twin = place[trajectory, "conditional"], place.get((trajectory, "unconditional"))
        unconditional = None if twin is None else predictions[twin : twin + 1]
        trajectory.advance(predictions[first : first + 1], unconditional)


def _times(values: list[float], device: torch.device) -> Tensor:
    """Times [rows] on the device, without waiting for it."""
    t = torch.tensor(values)
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)
