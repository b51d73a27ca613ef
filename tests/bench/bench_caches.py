"""Caches that decide while they run, MagCache and TaylorSeer, against fewer plain steps at equal MACs.

`slipstream bench caches`. Likeness to the plain picture of the same seed and to a converged one (200 steps), on
captions that the models never saw; MACs are what the runs really did. TeaCache's polynomial and MagCache's ratios are
fitted on other captions first. Beside the adaptive DeepCache stands the uniform one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import Backbone, Request, Result, generate
from models.accelerators import (
    Accelerator,
    AdaptiveDeepCache,
    DeepCache,
    FirstBlockCache,
    Forecast,
    MagCache,
    TaylorSeer,
    TeaCache,
)
from models.quality.metrics import Likeness
from models.shapes.judge import ShapesJudge
from tests.bench import zoo
from tests.bench.harness import note, options, quiet
from tests.bench.report import Report

STEPS, CONVERGED, CAPTIONS, FITTED = 25, 200, 12, 4


def drawn(
    backbone: Backbone, captions: Sequence[str], scheduler: str, steps: int, *caches: Accelerator
) -> list[Result]:
    """One picture a caption."""
    facts: dict[str, Any] = {"num_inference_steps": steps, "scheduler": scheduler, "acceleration": caches}
    return generate(backbone, [Request(prompt=text, seed=i, **facts) for i, text in enumerate(captions)], max_rows=24)


class Recorder:
    """What enters and leaves all blocks of a transformer, and the first attention, at every step of plain runs."""

    def __init__(self, module: Any) -> None:
        first, last = module.transformer_blocks[0], module.transformer_blocks[-1]
        self.inputs: list[Tensor] = []
        self.seen: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self._handles = [
            first.register_forward_pre_hook(lambda _, x: self.inputs.append(x[0].clone())),
            first.attn1.register_forward_pre_hook(lambda _, x: self.seen.append(x[0].clone())),
            last.register_forward_hook(lambda _, x, out: self.outputs.append(out.clone())),
        ]

    def close(self) -> None:
        """Listen no more."""
        for handle in self._handles:
            handle.remove()


def fit(backbone: Backbone, captions: Sequence[str], scheduler: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """MagCache's ratios and TeaCache's coefficients (degree 4) of a transformer, from one batch of plain runs."""
    recorder = Recorder(backbone.network.module)
    drawn(backbone, captions, scheduler, STEPS)
    recorder.close()
    effects = [out - x for out, x in zip(recorder.outputs, recorder.inputs, strict=True)]
    grown = [float((b.norm(dim=-1) / a.norm(dim=-1)).mean()) for a, b in pairwise(effects)]
    change = [_change(*pair) for pair in pairwise(recorder.seen)]
    moved = [_change(*pair) for pair in pairwise(effects)]
    coefficients = np.polyfit(torch.cat(change).numpy(), torch.cat(moved).numpy(), 4)
    return (1.0, *grown), tuple(float(c) for c in coefficients)


def _change(before: Tensor, now: Tensor) -> Tensor:
    """The relative change of each row."""
    dims = tuple(range(1, now.ndim))
    return (now - before).abs().mean(dim=dims) / before.abs().mean(dim=dims)


def caches(backbone: Backbone, captions: Sequence[str], scheduler: str) -> list[Accelerator]:
    """Every cache that fits, at settings that halve the work or more."""
    if backbone.spec.family == "unet":
        return [
            *(DeepCache(interval=n, order=order) for n in (2, 3) for order in (0, 1)),
            *(AdaptiveDeepCache(threshold=t, order=order) for t in (0.1, 0.2) for order in (0, 1)),
            Forecast(interval=2),
            Forecast(interval=3),
        ]
    ratios, coefficients = fit(backbone, captions, scheduler)
    note(f"fitted: ratios {ratios}, coefficients {coefficients}")
    return [
        *(FirstBlockCache(threshold=t, order=order) for t in (0.05, 0.1) for order in (0, 1)),
        *(TeaCache(threshold=t, coefficients=coefficients, order=order) for t in (0.1, 0.2) for order in (0, 1)),
        *(MagCache(ratios=ratios, threshold=0.12, order=order) for order in (0, 1)),
        *(TaylorSeer(interval=n, order=order) for n, order in ((2, 2), (3, 1), (3, 2))),
        Forecast(interval=2),
        Forecast(interval=3),
    ]


def name_of(cache: Accelerator) -> str:
    """What is not as by default, without what was fitted."""
    facts = cache.model_dump(exclude_defaults=True, exclude={"mode", "ratios", "coefficients"})
    return cache.mode + "".join(f" {key}={value}" for key, value in facts.items())


def main() -> None:
    """Both bundled models, two solvers."""
    given = options(__doc__, models=["shapes-sd", "shapes-dit"])
    quiet()
    report = Report("caches", "Caches against fewer plain steps", given)
    known = ShapesJudge().captions(FITTED + (2 if given.quick else CAPTIONS))
    captions, others = known[FITTED:], known[:FITTED]
    for name in zoo.names(given):
        backbone = zoo.model(name).backbone
        for scheduler in ("ddim", "dpmpp_2m"):
            note(f"{name}, {scheduler}")
            plain = drawn(backbone, captions, scheduler, STEPS)
            far = drawn(backbone, captions, scheduler, 20 if given.quick else CONVERGED)
            references = [[one.images[0] for one in results] for results in (plain, far)]
            full = sum(one.usage.macs for one in plain)
            table = []
            for cache in caches(backbone, others, scheduler):
                results = drawn(backbone, captions, scheduler, STEPS, cache)
                macs = sum(one.usage.macs for one in results)
                steps = max(1, int(STEPS * macs / full))
                controls = drawn(backbone, captions, scheduler, steps)
                row: dict[str, object] = {"run": name_of(cache), "fewer MACs": f"{full / macs:.2f}x", "plain": steps}
                for to, reference in zip(("plain", "converged"), references, strict=True):
                    for what, these in (("", results), ("its control ", controls)):
                        row[f"{what}to {to}"] = round(Likeness.of([r.images[0] for r in these], reference).psnr, 1)
                table.append(row)
            report.table(f"{name}, {scheduler}, {STEPS} steps, {len(captions)} captions, PSNR in dB", table)
    report.save()


if __name__ == "__main__":
    main()
