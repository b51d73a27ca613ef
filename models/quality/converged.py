"""The picture that a run comes nearer to the more steps it takes: drawn once with very many, and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from models.backbone import Backbone
from models.generate import generate
from models.request import Request, digest

STEPS = 200
"""So many that the solvers offered are within what a picture's 256 levels can show of each other."""
SOLVER = "dpmpp_2m"
"""Whose limit it is, where the model offers it: the same for runs of every scheduler."""
NOISY = ("euler_ancestral", "lcm")
"""Schedulers that draw new noise on the way: more steps give another picture, not a better one."""


class Converged:
    """Draws converged pictures, and keeps them as PNG in `folder`, or without one as long as this object lives."""

    def __init__(self, backbone: Backbone, folder: Path | None = None, steps: int = STEPS) -> None:
        self._backbone = backbone
        self._folder = folder
        self._steps = steps
        self._kept: dict[str, Image.Image] = {}
        self._model = f"{backbone.spec.config_hash} {backbone.dtype} {backbone.stepping} {backbone.digest}"

    def pictures(self, requests: Sequence[Request]) -> list[Image.Image]:
        """The converged picture of each plain request, one image each.

        Raises a `ValueError` for a scheduler that does not converge.
        """
        if any(request.scheduler in NOISY for request in requests):
            raise ValueError(f"runs of {' and '.join(NOISY)} do not converge")
        limit: dict[str, Any] = {"num_inference_steps": self._steps}
        if SOLVER in self._backbone.spec.schedulers:
            limit["scheduler"] = SOLVER
        wanted = [replace(request, **limit) for request in requests]
        names = [self._name(request) for request in wanted]
        missing = {name: one for name, one in zip(names, wanted, strict=True) if self._find(name) is None}
        for name, result in zip(missing, generate(self._backbone, list(missing.values())), strict=True):
            self._keep(name, result.images[0])
        return [self._kept[name] for name in names]

    def _name(self, request: Request) -> str:
        return hashlib.sha256(f"{self._model} {digest([request])}".encode()).hexdigest()[:24]

    def _find(self, name: str) -> Image.Image | None:
        if name not in self._kept and self._folder is not None and (file := self._folder / f"{name}.png").is_file():
            with Image.open(file) as opened:
                self._kept[name] = opened.convert("RGB")
        return self._kept.get(name)

    def _keep(self, name: str, picture: Image.Image) -> None:
        self._kept[name] = picture
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            half = self._folder / f"{name}.part"
            picture.save(half, "PNG")
            half.replace(self._folder / f"{name}.png")  # a run that is cut off leaves no half picture
