"""A student's settings: what its file says of itself, and what may go on from what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from models.errors import RequestError

TRAJECTORIES = ("trajectories", "own")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is distilled and how. `data` is "trajectories", "own", "shapes" (rendered scenes, noised) or a directory."""

    model: str
    guidance_scale: float
    rank: int
    steps: int
    batch: int
    learning_rate: float
    relative: bool
    muon: bool
    data: str
    start_from: list[str]
    num_inference_steps: int
    ema_decay: float
    seed: int

    def metadata(self) -> dict[str, Any]:
        """What the adapter file says of itself."""
        return {
            "guidance_scale": self.guidance_scale,
            "negative_prompt": "",
            "rank": self.rank,
            "lora_alpha": self.rank,
            "config_hash": self.model,
            "steps": self.steps,
            "relative": self.relative,
            "muon": self.muon,
            "num_inference_steps": self.num_inference_steps,
            "data": self.data if self.data in TRAJECTORIES else "noised",
        }


def header(file: Path, settings: Settings) -> dict[str, str]:
    """What a student's file says of itself; a `RequestError` where it was made for another model or rank."""
    try:
        with safe_open(file, "pt") as opened:
            found: dict[str, str] = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise RequestError("start_from", f"{file} is no safetensors file: {error}") from error
    now = settings.metadata()
    fixed = ("config_hash", "rank") if settings.steps else ("config_hash", "rank", "guidance_scale")
    for name in fixed:
        if found.get(name) != str(now[name]):
            raise RequestError("start_from", f"{file} has {name} {found.get(name)}, not {now[name]}")
    return found


def trained_steps(header: Mapping[str, str]) -> int:
    """How long a student was trained, as its file says."""
    return int(header.get("steps", 0))


def remember(folder: Path, settings: Settings) -> None:
    """Write the settings; hold those of an interrupted run against them. It may go on longer, or on its own path."""
    file, now = folder / "settings.json", asdict(settings)
    if file.is_file():
        before = json.loads(file.read_text())
        free = {"steps"} | ({"data"} if {settings.data, before["data"]} <= set(TRAJECTORIES) else set())
        for name in now.keys() - free:
            if before.get(name) != now[name]:
                raise RequestError(name, f"{now[name]} differs from {before.get(name)} of the run in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(now, indent=2) + "\n")
