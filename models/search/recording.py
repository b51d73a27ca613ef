"""Plain runs recorded: the inner products of what every step predicted, and the last latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from models.backbone import Backbone
from models.denoise import Tick
from models.generate import start
from models.request import Request
from models.resolve import resolve
from models.search.masks import Path
from models.solvers.exact import combine
from models.trajectory import Trajectory


@torch.inference_mode()
def record(
    backbone: Backbone, requests: Sequence[Request], tick: Callable[[], None] = lambda: None
) -> tuple[Path, Tensor]:
    """Run plain requests, alike in all but prompt and seed: their path, and the last latents [pictures, c, h, w].

    `tick` is called after every step. Held meanwhile: steps + 2 latents a picture.
    """
    runs = [resolve(backbone.spec, backbone.scheduler_config, request) for request in requests]
    schedule = runs[0].schedule
    trajectories = [trajectory for run in runs for trajectory in start(backbone, run)]
    first = torch.cat([t.latents for t in trajectories])
    predictions = []
    while not trajectories[0].done:
        predictions.append(_step(backbone, trajectories))
        tick()
    last = torch.cat([t.latents for t in trajectories])
    vectors = torch.stack([*predictions, first, last]).double().flatten(1).cpu().numpy()
    gram = vectors @ vectors.T / vectors.shape[1]
    return Path(np.array(schedule.times, dtype=np.float64), gram), last


def _step(backbone: Backbone, trajectories: Sequence[Trajectory]) -> Tensor:
    """One plain step of trajectories of one group; returns what they followed, [trajectories, c, h, w]."""
    tick = Tick(backbone, trajectories, [(row, t) for t in trajectories for row in t.rows()])
    out = tick.forward()
    tick.step(out)
    return torch.cat([combine(t, {role: out[i : i + 1] for role, i in tick.places[t].items()}) for t in trajectories])
