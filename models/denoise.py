"""The heart: one backbone forward and one scheduler step for every trajectory of a tick."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.device import upload
from models.reuse.plans import Role
from models.reuse.rows import Row
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
        trajectory.advance(predictions[trajectory, "conditional"], predictions.get((trajectory, "unconditional")))
    backbone.features.trim()


def predict(backbone: Backbone, rows: Sequence[tuple[Row, Trajectory]]) -> dict[tuple[Trajectory, Role], Tensor]:
    """One forward over rows of one group; the prediction [1, channels, h, w] of each trajectory's rows by role.

    Rows of one role stand together, in the order in which diffusers' pipelines batch them.
    """
    rows = [pair for role in backbone.roles for pair in rows if pair[0].role == role]
    inputs = {trajectory: trajectory.model_input() for _, trajectory in rows}
    x = torch.cat([inputs[trajectory] for _, trajectory in rows])  # [rows, channels, h, w]
    t = upload([float(trajectory.timestep) for _, trajectory in rows], x.device)
    parts = [trajectory.conditioning[row.role] for row, trajectory in rows]
    conditioning = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    out = backbone.forward(x, t, conditioning, [row for row, _ in rows])
    return {(trajectory, row.role): out[i : i + 1] for i, (row, trajectory) in enumerate(rows)}
