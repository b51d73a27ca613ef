"""The heart: one backbone forward and one scheduler step for every trajectory of a tick."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.conditioning import stack
from models.device import upload
from models.guidance import CONDITIONAL
from models.reuse.plans import Role
from models.reuse.rows import Row
from models.reuse.sites import OUTPUT, Feature
from models.solvers import batched, exact
from models.trajectory import Trajectory

if TYPE_CHECKING:
    from models.backbone import Backbone

PREDICTION = Feature(OUTPUT, "value")
Pair = tuple[Row, Trajectory]


@torch.inference_mode()
def advance(backbone: Backbone, trajectories: Sequence[Trajectory]) -> None:
    """Advance trajectories of one group by one evaluation each, whatever each of their plans asks for.

    Steps whose prediction is foretold need no forward: a trajectory takes those that follow at once. An exception in
    the forward leaves every trajectory at its step, so that the tick can be tried again in parts; one behind it may
    leave some at a foretold step, from where they go on. A `batch_invariant` backbone advances one trajectory after
    another, each in a forward of its own rows: products of matrices of another shape would add up in another order.
    """
    for part in [[t] for t in trajectories] if backbone.batch_invariant else [trajectories]:
        _advance(backbone, part)
    backbone.features.trim()


def _advance(backbone: Backbone, trajectories: Sequence[Trajectory]) -> None:
    computed = [t for t in trajectories if not t.plan.foretold]
    if computed:
        tick = Tick(backbone, computed, [(row, t) for t in computed for row in t.rows()])
        tick.step(tick.forward())
    while trajectories := [t for t in trajectories if not t.done and t.plan.foretold]:
        tick = Tick(backbone, trajectories, ())
        tick.step(tick.foretold())


def predict(backbone: Backbone, rows: Sequence[Pair]) -> dict[Trajectory, dict[Role, Tensor]]:
    """One forward over rows of one group; the prediction [1, channels, h, w] of each trajectory's rows by role."""
    tick = Tick(backbone, list(dict.fromkeys(trajectory for _, trajectory in rows)), rows)
    out = tick.forward()
    return {
        trajectory: {role: out[i : i + 1] for role, i in tick.places[trajectory].items()} for trajectory in tick.places
    }


class Tick:
    """One step of trajectories of one group: `forward` or `foretold` gives predictions, `step` follows them.

    Rows of one role stand together, in the order in which diffusers' pipelines batch them. A prediction that is
    foretold stands for a trajectory's only row.
    """

    def __init__(self, backbone: Backbone, trajectories: Sequence[Trajectory], rows: Sequence[Pair]) -> None:
        self.backbone = backbone
        self.trajectories = trajectories
        self.rows = [pair for role in backbone.roles for pair in rows if pair[0].role == role]
        self.places: dict[Trajectory, dict[Role, int]] = {}
        for i, (row, trajectory) in enumerate(self.rows):
            self.places.setdefault(trajectory, {})[row.role] = i
        for i, trajectory in enumerate(trajectories):
            self.places.setdefault(trajectory, {CONDITIONAL: i})
        self._by_scheduler = [t for t in trajectories if t.table is None]
        self._by_table = [t for t in trajectories if t.table is not None]
        if self._by_table:
            self._moves = [self._move(trajectory) for trajectory in self._by_table]
            state = self._by_table[0].state
            self._packed = batched.pack(self._moves, state.dtype, state.device)
            self._state = batched.stack([trajectory.state for trajectory in self._by_table], self._packed)

    def _move(self, trajectory: Trajectory) -> batched.Move:
        assert trajectory.table is not None  # noqa: S101
        places = self.places[trajectory]
        weights = trajectory.guidance.weights(trajectory.scales) if len(places) > 1 else {CONDITIONAL: 1.0}
        rows = tuple((place, weights[role]) for role, place in places.items())
        registers, masked = len(trajectory.state), trajectory.outside is not None
        return batched.Move(trajectory.table, trajectory.step, rows, registers, masked)

    def forward(self) -> Tensor:
        """One forward of the network: predictions [rows, channels, h, w], in the order of `rows`."""
        x = self._inputs()
        t = upload([trajectory.time for _, trajectory in self.rows], x.device)
        conditioning = stack([trajectory.conditioning[row.role] for row, trajectory in self.rows])
        return self.backbone.forward(x, t, conditioning, [row for row, _ in self.rows])

    def _inputs(self) -> Tensor:
        """What the network is given, [rows, channels, h, w]."""
        single = {t: exact.model_input(t) for t in self._by_scheduler}
        if not self._by_table:
            return torch.cat([single[t] for _, t in self.rows])
        scaled = batched.model_input(self._state, self._packed.input_scale, self.backbone.dtype)
        if not single:
            return scaled.index_select(0, self._packed.owners)
        single |= {t: scaled[i : i + 1] for i, t in enumerate(self._by_table)}
        return torch.cat([single[t] for _, t in self.rows])

    def foretold(self) -> Tensor:
        """What the trajectories' own past predictions say of this one, [trajectories, channels, h, w]."""
        readings = [(t.memory["output"], t.plan.output.reads[OUTPUT]) for t in self.trajectories]
        return self.backbone.features.read(readings)

    def step(self, predictions: Tensor) -> None:
        """Follow the predictions [rows or trajectories, channels, h, w], and remember those that are wanted again."""
        if self._by_table:
            states = self._step_together(predictions).unbind()
            for trajectory, state in zip(self._by_table, states, strict=True):
                trajectory.moved(state)
        for trajectory in self._by_scheduler:
            rows = {role: predictions[i : i + 1] for role, i in self.places[trajectory].items()}
            combined = exact.combine(trajectory, rows)
            self._remember([trajectory], combined)
            if trajectory.watched:
                trajectory.foreseen = exact.foresee(trajectory, combined)
            # A scheduler has moved on once it has stepped, so its trajectory does too before another one may fail.
            trajectory.moved(exact.step(trajectory, combined))

    def _step_together(self, predictions: Tensor) -> Tensor:
        """The next states [trajectories, registers, channels, h, w] of those that go by their tables."""
        shape = tuple(self._state.shape[2:])
        combined = batched.combine(predictions, self._packed, shape[0])
        self._remember(self._by_table, combined)
        if any(trajectory.watched for trajectory in self._by_table):
            foreseen = batched.preview(self._state, combined, self._packed)
            for trajectory, latents in zip(self._by_table, foreseen.unsqueeze(1).unbind(), strict=True):
                trajectory.foreseen = latents if trajectory.watched else None
        generators = [trajectory.generator for trajectory in self._by_table]
        drawn = [(g, g.get_state()) for g, move in zip(generators, self._moves, strict=True) if move.draws]
        try:
            noise = batched.draw_noise(self._moves, generators, shape, self._state.dtype, self._state.device)
            state = batched.step(self._state, combined, self._packed, noise)
            outsides = [t.outside for t in self._by_table if t.outside is not None]
            return batched.hold(state, self._packed, outsides) if outsides else state
        except Exception:
            for generator, before in drawn:  # so that the same step, tried again, draws the same
                generator.set_state(before)
            raise

    def _remember(self, trajectories: Sequence[Trajectory], combined: Tensor) -> None:
        """Keep combined predictions [trajectories, channels, h, w] where a later step is foretold from them."""
        keepers = [i for i, t in enumerate(trajectories) if PREDICTION in t.plan.output.keep]
        if keepers:
            entries = [(trajectories[i].memory["output"], (PREDICTION, trajectories[i].step)) for i in keepers]
            index = upload(keepers, combined.device)
            kept = combined if len(keepers) == len(combined) else combined.index_select(0, index)
            self.backbone.features.write(entries, kept.to(self.backbone.latent_dtype))
