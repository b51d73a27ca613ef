"""The greedy search for a DiTFastAttn plan (Yuan et al., NeurIPS 2024): the cheapest method whose error stays small.

Steps in order, blocks in order. At each step the network's output with every attention in full, along the trajectory as
it is compressed so far, is the reference; a block takes the first candidate for which the output's error stays below
its share (block + 1) / L of the threshold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from models.backbone import Backbone
from models.denoise import predict
from models.errors import RequestError, WrongBackbone
from models.generate import start
from models.plan import Key, Method, StepPlan, computes, row_plan
from models.request import Request
from models.resolve import resolve
from models.rows import Row
from models.search.attention_plan import Metric, Plan
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
    runs = [resolve(backbone.spec, backbone.scheduler_config, replace(r, acceleration=())) for r in requests]
    trajectories = [trajectory for run in runs for trajectory in start(backbone, run)]
    first = runs[0]
    if len({(t.group, r.scheduler, r.num_inference_steps, r.guided) for r in runs for t in trajectories}) != 1:
        raise RequestError("requests", "calibration requests must be alike in size, scheduler, steps and guidance")
    tokens = backbone.spec.tokens(first.width, first.height)
    search = _Search(backbone, trajectories, threshold, tokens // 8 if window is None else window, metric)
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

    @property
    def settings(self) -> dict[str, object]:
        """What a checkpoint must agree on."""
        first = self.trajectories[0]
        return {
            "config_hash": self.backbone.spec.config_hash,
            "threshold": self.threshold,
            "window": self.window,
            "metric": self.metric,
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
        for block in range(blocks):
            for candidate in CANDIDATES:
                if "asc" in candidate and not guided:
                    continue
                methods[block] = candidate
                if error(self._output(methods), reference, self.metric) < (block + 1) / blocks * self.threshold:
                    break
                methods[block] = "full"
        return tuple(methods)

    def take(self, methods: Sequence[Method]) -> None:
        """Take the step with these methods, remembering everything it computes."""
        predictions = predict(self.backbone, self._rows(methods, keep=True))
        for trajectory in self.trajectories:
            trajectory.follow(predictions[trajectory])

    def _output(self, methods: Sequence[Method]) -> Tensor:
        predictions = predict(self.backbone, self._rows(methods, keep=False))
        return torch.cat([one for rows in predictions.values() for one in rows.values()])

    def _rows(self, methods: Sequence[Method], keep: bool) -> list[tuple[Row, Trajectory]]:
        blocks = range(self.backbone.spec.depth)
        keys: list[Key] = [(kind, block) for block in blocks for kind in ("attention", "residual")]
        rows = []
        for trajectory in self.trajectories:
            for row in trajectory.rows():
                row.plan = row_plan(StepPlan(attention=tuple(methods), window=self.window), row.role)
                if keep:
                    row.plan = replace(row.plan, keep=frozenset(key for key in keys if computes(row.plan, key)))
                rows.append((row, trajectory))
        return rows


def _resume(checkpoint: Path | None, search: _Search) -> list[tuple[Method, ...]]:
    if checkpoint is None or not checkpoint.is_file():
        return []
    saved = json.loads(checkpoint.read_text())
    if saved["settings"] != search.settings:
        raise RequestError("checkpoint", f"{checkpoint} is of another search: {saved['settings']}")
    return [tuple(row) for row in saved["table"]]
