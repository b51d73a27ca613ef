"""What a calibration has so far, on disk: a folder of one JSON file of settings, one line a run, and arrays."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as File
from typing import Any

import numpy as np
from PIL import Image

from models.errors import RequestError
from models.search.fitting import Fit
from models.search.masks import Path
from models.search.measuring import Scores


class Kept:
    """Without a folder nothing outlives this object. Raises a `RequestError` for a folder with other settings."""

    def __init__(self, folder: File | None, settings: Mapping[str, Any]) -> None:
        self._folder = folder
        self.scores: dict[str, Scores] = {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "settings.json"
        if not file.is_file():
            file.write_text(json.dumps(settings))
        if json.loads(file.read_text()) != json.loads(json.dumps(settings)):
            raise RequestError("checkpoint", f"{folder} is of another calibration: {file.read_text()}")
        for line in self._lines():
            name, _, scores = line.partition("\t")
            self.scores[name] = Scores.model_validate_json(scores)

    def _lines(self) -> list[str]:
        """Whole lines: one that a kill has cut off does not count, and is cut away."""
        file = self._file("scores.tsv")
        text = file.read_text() if file is not None and file.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if file is not None and whole != text:
            file.write_text(whole)
        return whole.splitlines()

    def add(self, name: str, scores: Scores) -> None:
        """Note one run's scores."""
        self.scores[name] = scores
        if (file := self._file("scores.tsv")) is not None:
            with file.open("a") as opened:
                opened.write(f"{name}\t{scores.model_dump_json()}\n")

    def path(self, make: Callable[[], Path]) -> Path:
        """The recorded path, made where it is not here yet."""
        found = self._arrays("path", lambda: vars(make()))
        return Path(**found)

    def fit(self, make: Callable[[], Fit]) -> Fit:
        """What was fitted, fitted where it is not here yet."""
        found = self._arrays("fit", lambda: {name: np.array(value) for name, value in vars(make()).items()})
        return Fit(**{name: tuple(map(float, values)) for name, values in found.items()})

    def pictures(self, name: str, make: Callable[[], Sequence[Image.Image]]) -> list[Image.Image]:
        """Pictures of this name, drawn where they are not here yet."""
        found = self._arrays(name, lambda: {"pictures": np.stack([np.asarray(p.convert("RGB")) for p in make()])})
        return [Image.fromarray(picture) for picture in found["pictures"]]

    def _arrays(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        file = self._file(f"{name}.npz")
        if file is None:
            return dict(make())
        if not file.is_file():
            half = file.with_suffix(".part.npz")
            np.savez(half, **make())
            half.replace(file)  # a kill leaves no half file
        with np.load(file, allow_pickle=False) as opened:
            return {key: opened[key] for key in opened.files}

    def _file(self, name: str) -> File | None:
        return None if self._folder is None else self._folder / name
