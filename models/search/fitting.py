"""What MagCache and TeaCache need to know of a transformer: fitted to plain runs that remember what they computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.accelerators import TeaCache
from models.backbone import Backbone
from models.denoise import Tick
from models.generate import start
from models.networks.sites import TransformerSites, blocks
from models.request import Request
from models.resolve import resolve
from models.reuse.plans import Entry, Reading, Recall
from models.reuse.rows import Row
from models.reuse.sites import Feature

DEGREE = 4
"""Of TeaCache's polynomial."""
NEVER = TeaCache(threshold=1e-12, coefficients=(1.0, 0.0))
"""Its gate reads all that is to be fitted, and never skips."""
LEAST_STEPS = 8
UNSEEN = 2
"""Last steps: the gate's last, of which nothing is kept, and the one that TeaCache always computes."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """`mag_ratios`: how much larger the blocks' effect is than a step before, one a step, the first 1.
    `tea_coefficients`: of the polynomial from the change of the first block's modulated input to the output's.
    """

    mag_ratios: tuple[float, ...]
    tea_coefficients: tuple[float, ...]


def can_fit(backbone: Backbone, steps: int) -> bool:
    """Whether the model has blocks that give both, and a run of so many steps says enough of them."""
    spec = backbone.spec
    return (
        steps >= LEAST_STEPS
        and spec.family != "unet"
        and "gated by modulated" in spec.sites.understands(blocks(0, spec.depth))
    )


@dataclass
class _Watched:
    """The rows of one tick: the blocks' effects, the modulated inputs, and the predictions, [rows, ...]."""

    effects: Tensor
    inputs: Tensor
    outputs: Tensor


@torch.inference_mode()
def fit(backbone: Backbone, requests: Sequence[Request]) -> Fit:
    """Run plain requests, alike in all but prompt and seed, and fit.

    A ratio is the mean over rows and the image's tokens of the effect's norm over that of a step before (Ma et al.,
    arXiv:2506.09045); the last steps, whose effect nobody keeps, repeat the one before. The coefficients are least
    squares over all rows and steps of mean|a - b| / mean|b| (Liu et al., arXiv:2411.19108).
    """
    ratios, moved, gave = [1.0], [], []
    before: _Watched | None = None
    for now in _watch(backbone, requests):
        if before is not None:
            ratios.append(float((now.effects.norm(dim=-1) / before.effects.norm(dim=-1)).mean()))
            moved.append(_change(now.inputs, before.inputs))
            gave.append(_change(now.outputs, before.outputs))
        before = now
    coefficients = np.polyfit(np.concatenate(moved), np.concatenate(gave), DEGREE)
    return Fit(
        tuple(round(r, 6) for r in [*ratios, *ratios[-1:] * UNSEEN]), tuple(float(f"{c:.9g}") for c in coefficients)
    )


def _change(now: Tensor, before: Tensor) -> Array:
    rows: Array = ((now - before).abs().flatten(1).mean(1) / before.abs().flatten(1).mean(1)).cpu().numpy()
    return rows


def _watch(backbone: Backbone, requests: Sequence[Request]) -> Iterator[_Watched]:
    """Every step of the runs but the last `UNSEEN`."""
    site, sites = blocks(0, backbone.spec.depth), backbone.spec.sites
    assert isinstance(sites, TransformerSites)  # noqa: S101  (`can_fit`)
    runs = [resolve(backbone.spec, backbone.scheduler_config, replace(r, acceleration=(NEVER,))) for r in requests]
    trajectories = [trajectory for run in runs for trajectory in start(backbone, run)]
    for step in range(trajectories[0].num_steps):
        tick = Tick(backbone, trajectories, [(row, t) for t in trajectories for row in t.rows()])
        out = tick.forward()
        rows = [row for row, _ in tick.rows]
        if step < trajectories[0].num_steps - UNSEEN:
            effects = _read(backbone, rows, (Feature(site, "effect"), step))
            effects = effects[:, sites.image(effects.shape[1], *trajectories[0].latents.shape[2:])]
            inputs = _read(backbone, rows, (Feature(site, "probe"), 0))
            yield _Watched(effects.double(), inputs.double(), out.double())
        tick.step(out)


def _read(backbone: Backbone, rows: Sequence[Row], entry: Entry) -> Tensor:
    return backbone.features.read([(row.memory, Reading(Recall(), (entry,), (1.0,))) for row in rows])
