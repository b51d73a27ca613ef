"""The search for a time-step warp: hill climbing on γ for few-step image-to-image (Kim et al., ACCV 2024)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from models.backbone import Backbone
from models.errors import RequestError
from models.generate import generate
from models.request import Request, digest

STEP_SIZES = (0.2, 0.1, 0.05, 0.02, 0.01)
LOWEST, HIGHEST = 0.05, 20.0


@dataclass(frozen=True)
class Warp:
    """The γ found, its mean PSNR in dB to the reference pictures, and every γ that was tried."""

    gamma: float
    psnr: float
    tried: dict[float, float]


def search_warp(
    backbone: Backbone,
    requests: Sequence[Request],
    *,
    num_inference_steps: int,
    reference_steps: int = 50,
    checkpoint: Path | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> Warp:
    """Climb from γ = 1 in ever smaller steps to the best mean PSNR against `reference_steps` plain steps.

    `requests` are image-to-image requests; their steps and warp are overridden. `checkpoint` keeps what was tried, so
    that a later call goes on from there. `progress` is called with each (γ, PSNR).
    Raises a `RequestError` for requests without an image, and for a checkpoint of another search.
    """
    if any(request.image is None for request in requests):
        raise RequestError("image", "the warp is searched on image-to-image requests")
    settings: dict[str, object] = {
        "config_hash": backbone.spec.config_hash,
        "num_inference_steps": num_inference_steps,
        "reference_steps": reference_steps,
        "requests": digest([_at(request, num_inference_steps, 1.0) for request in requests]),
    }
    tried = _resume(checkpoint, settings)
    reference = _pictures(backbone, requests, reference_steps, 1.0)

    def score(gamma: float) -> float:
        if gamma not in tried:
            tried[gamma] = _psnr(reference, _pictures(backbone, requests, num_inference_steps, gamma))
            if checkpoint is not None:
                checkpoint.write_text(json.dumps({"settings": settings, "tried": tried}))
        if progress is not None:
            progress(gamma, tried[gamma])
        return tried[gamma]

    gamma = climb(score, 1.0)
    return Warp(gamma, tried[gamma], tried)


def climb(score: Callable[[float], float], start: float) -> float:
    """Hill climbing in one dimension: move while a neighbour is better, then halve the reach."""
    best = start
    for size in STEP_SIZES:
        while True:
            neighbours = [round(best + step, 4) for step in (-size, size) if LOWEST <= best + step <= HIGHEST]
            better = max(neighbours, key=score)
            if score(better) <= score(best):
                break
            best = better
    return best


def _pictures(backbone: Backbone, requests: Sequence[Request], steps: int, gamma: float) -> list[np.ndarray]:
    asked = [_at(request, steps, gamma) for request in requests]
    return [np.asarray(image) for result in generate(backbone, asked) for image in result.images]


def _at(request: Request, steps: int, gamma: float) -> Request:
    return replace(request, num_inference_steps=steps, timestep_warp=gamma)


def _resume(checkpoint: Path | None, settings: dict[str, object]) -> dict[float, float]:
    """The mean PSNR by γ that an interrupted search tried."""
    if checkpoint is None or not checkpoint.is_file():
        return {}
    saved = json.loads(checkpoint.read_text())
    if saved.get("settings") != settings:
        raise RequestError("checkpoint", f"{checkpoint} is of another search: {saved.get('settings')}")
    return {float(gamma): psnr for gamma, psnr in saved["tried"].items()}


def _psnr(references: Sequence[np.ndarray], pictures: Sequence[np.ndarray]) -> float:
    errors = [float(np.mean((a.astype(float) - b) ** 2)) for a, b in zip(references, pictures, strict=True)]
    return math.fsum(10 * math.log10(255**2 / max(error, 1e-3)) for error in errors) / len(errors)
