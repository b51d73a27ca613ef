"""The greedy search for a DiTFastAttn plan (Yuan et al., NeurIPS 2024): the cheapest method whose error stays small.

Steps in order, blocks in order. At each step the network's output with every attention in full, along the trajectory as
it is compressed so far, is the reference; a block takes the first candidate for which the output's error stays below
its share (block + 1) / L of the threshold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from models.accelerators.ditfastattn import attention_plan, possible
from models.backbone import Backbone
from models.denoise import Tick, predict
from models.errors import RequestError, WrongBackbone
from models.generate import start
from models.networks.sites import attention
from models.request import Request, digest
from models.resolve import resolve
from models.reuse.compile import Known, computes, row_plan, view
from models.reuse.plans import Role, RowPlan
from models.reuse.rows import Row
from models.reuse.sites import Feature
from models.search.attention_plan import Method, Metric, Plan
from models.trajectory import Trajectory

CANDIDATES: tuple[Method, ...] = ("ast", "wa-rs+asc", "wa-rs", "asc")
Progress = Callable[[int, int], None]


def search_plan(
    backbone: Backbone,
    requests: Sequence[Request],
    *,
    threshold: float,
    window: int | None = None,
    metric: Metric = "paper",
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Search over a calibration set of requests, alike in all but prompt and seed.

    `threshold` is the paper's δ (0.025, 0.05 … 0.15 are D1 … D6); `window` the half width of the band in tokens, an
    eighth of them by default. With `checkpoint` the steps found are written there and a later call goes on from them.
    Raises a `RequestError` for a backbone that is no transformer, or requests that differ in more than prompt and seed.
    """
    if backbone.spec.family != "dit":
        raise WrongBackbone("model", f"{backbone.spec.name} is a {backbone.spec.family}; plans are for transformers")
    requests = [replace(request, acceleration=()) for request in requests]
    runs = [resolve(backbone.spec, backbone.scheduler_config, request) for request in requests]
    trajectories = [trajectory for run in runs for trajectory in start(backbone, run)]
    first = runs[0]
    if len({(t.group, r.scheduler, r.num_inference_steps, r.guided) for r in runs for t in trajectories}) != 1:
        raise RequestError("requests", "calibration requests must be alike in size, scheduler, steps and guidance")
    tokens = backbone.spec.tokens(first.width, first.height)
    window = tokens // 8 if window is None else window
    search = _Search(backbone, trajectories, threshold, window, metric, digest(requests))
    table = _resume(checkpoint, search)
    steps = len(first.steps)
    for step in range(steps):
        if step == len(table):
            table.append(search.choose())
            if checkpoint is not None:
                checkpoint.write_text(json.dumps({"settings": search.settings, "table": table}))
        search.take(table[step])
        if progress is not None:
            progress(step + 1, steps)
    return Plan(
        model=backbone.spec.name,
        config_hash=backbone.spec.config_hash,
        scheduler=first.scheduler,
        num_inference_steps=first.num_inference_steps,
        tokens=tokens,
        guidance=first.guided,
        window=search.window,
        threshold=threshold,
        metric=metric,
        table=tuple(table),
    )


def error(output: Tensor, reference: Tensor, metric: Metric) -> float:
    """The relative error, mean of min(|a - b| / max(|a|, |b|), 10); `signed` takes max(a, b), as the code does."""
    a, b = (output.abs(), reference.abs()) if metric == "paper" else (output, reference)
    scale = torch.maximum(a, b)
    return float(((output - reference).abs() / (scale + 1e-6)).clamp(0, 10).mean())


@dataclass
class _Search:
    """The compressed trajectory so far; every feature that a later step might share is remembered."""

    backbone: Backbone
    trajectories: list[Trajectory]
    threshold: float
    window: int
    metric: Metric
    requests: str  # their digest
    known: dict[Role, Known] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, object]:
        """What a checkpoint must agree on."""
        first = self.trajectories[0]
        return {
            "config_hash": self.backbone.spec.config_hash,
            "threshold": self.threshold,
            "window": self.window,
            "metric": self.metric,
            "requests": self.requests,
            "trajectories": len(self.trajectories),
            "steps": first.num_steps,
            "scheduler": type(first.scheduler).__name__,
            "scale": first.scales.guidance,
        }

    def choose(self) -> tuple[Method, ...]:
        """The methods of the coming step."""
        blocks = self.backbone.spec.depth
        methods: list[Method] = ["full"] * blocks
        if self.trajectories[0].step == 0:
            return tuple(methods)
        guided = self.trajectories[0].plan.unconditional is not None
        reference = self._output(methods)
        candidates = [method for method in CANDIDATES if method in possible(self.backbone.spec.sites)]
        for block in range(blocks):
            for candidate in candidates:
                if "asc" in candidate and not guided:
                    continue
                methods[block] = candidate
                if error(self._output(methods), reference, self.metric) < (block + 1) / blocks * self.threshold:
                    break
                methods[block] = "full"
        return tuple(methods)

    def take(self, methods: Sequence[Method]) -> None:
        """Take the step with these methods, remembering everything it computes."""
        rows = self._rows(methods)
        for row, _ in rows:
            row.plan = replace(row.plan, keep=self._computed(row.plan))
        tick = Tick(self.backbone, self.trajectories, rows)
        predictions = tick.forward()
        for row in {row.role: row for row, _ in rows}.values():
            self.known.setdefault(row.role, {}).update({feature: [row.plan.step] for feature in row.plan.keep})
        for row, _ in rows:
            row.memory.forget([entry for entry in row.memory.slots if entry[1] not in self.known[row.role][entry[0]]])
        tick.step(predictions)

    def _output(self, methods: Sequence[Method]) -> Tensor:
        predictions = predict(self.backbone, self._rows(methods))
        return torch.cat([one for rows in predictions.values() for one in rows.values()])

    def _computed(self, plan: RowPlan) -> frozenset[Feature]:
        """All that a later step might share."""
        sites = [attention(block) for block in range(self.backbone.spec.depth)]
        features = [Feature(site, "value") for site in sites]
        if "wa-rs" in possible(self.backbone.spec.sites):
            features += [Feature(site, "residual", self.window) for site in sites]
        return frozenset(f for f in features if computes(self.backbone.spec.sites, plan.reads, f))

    def _rows(self, methods: Sequence[Method]) -> list[tuple[Row, Trajectory]]:
        sites, asked = self.backbone.spec.sites, attention_plan(methods, self.window)
        step = self.trajectories[0].step
        rows = [(row, trajectory) for trajectory in self.trajectories for row in trajectory.rows()]
        roles = {row.role for row, _ in rows}
        plans = {role: row_plan(sites, view(asked, role), self.known.get(role, {}), step) for role in roles}
        for row, _ in rows:
            row.plan = plans[row.role]
        return rows


def _resume(checkpoint: Path | None, search: _Search) -> list[tuple[Method, ...]]:
    if checkpoint is None or not checkpoint.is_file():
        return []
    saved = json.loads(checkpoint.read_text())
    if saved["settings"] != search.settings:
        raise RequestError("checkpoint", f"{checkpoint} is of another search: {saved['settings']}")
    return [tuple(row) for row in saved["table"]]
