"""Kim et al.'s table for editing (ACCV 2024, arXiv:2401.17547): a shallower U-Net and warped time steps in few steps.

    slipstream bench edit --edits 32

For 5, 10 and 20 steps, with and without `depth_skip`, with and without the γ that `slipstream warp` finds on other
edits: latency over 50 plain steps (rounds taken in turns), the network's weights where it is loaded in part
(`--depth`), PSNR to the picture of 50 plain steps, and the share of edits that the analytic judge lets pass.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from models import Backbone, Request, generate, load, search_warp
from models.accelerators import DepthSkip
from models.costs.macs import macs
from models.shapes.editor import held_out_edits
from models.shapes.edits import Edit, judge, sample_edits
from tests.bench.harness import machine, note, options, race

PLAIN_STEPS = 50
PAPER = {"footprint": -0.392, "latency": -0.814}
WARP_SEED = 31
"""The edits that γ is searched on are not those that it is measured on."""


@dataclass(frozen=True)
class Way:
    """One way to carry out an edit."""

    steps: int
    depth: int | None
    gamma: float

    @property
    def name(self) -> str:
        """As the table calls it."""
        parts = [f"{self.steps} steps"]
        parts += [] if self.depth is None else [f"`depth_skip:depth={self.depth}`"]
        parts += [] if self.gamma == 1.0 else [f"`timestep_warp` {self.gamma:g}"]
        return ", ".join(parts)


@dataclass(frozen=True)
class Line:
    """What was measured of one way; ratios are over 50 plain steps."""

    name: str
    latency: float
    macs: float
    footprint: float
    psnr: float | None
    done: float
    both: float


def request(edit: Edit, seed: int, way: Way) -> Request:
    """The edit as the library takes it."""
    return Request(
        prompt=edit.instruction,
        image=edit.before.picture(),
        seed=seed,
        num_inference_steps=way.steps,
        timestep_warp=way.gamma,
        acceleration=() if way.depth is None else DepthSkip(depth=way.depth),
    )


def carried_out(backbone: Backbone, edits: Sequence[Edit], way: Way) -> list[Image.Image]:
    """The edited pictures; edit i is drawn from seed i."""
    results = generate(backbone, [request(edit, i, way) for i, edit in enumerate(edits)])
    return [result.images[0] for result in results]


def psnr(picture: Image.Image, reference: Image.Image) -> float:
    """In dB; equal pictures are 100."""
    error = float(np.mean((np.asarray(picture, dtype=float) - np.asarray(reference, dtype=float)) ** 2))
    return 10 * math.log10(255**2 / max(error, 255**2 / 1e10))


def weights(model: str, depth: int | None) -> int:
    """Bytes of the whole model as loaded with `--depth`."""
    return load(model, device="cpu", dtype="float32", depth=depth).weight_bytes()


def measure(model: str, count: int, search: int, steps: Sequence[int], depth: int, rounds: int) -> dict[str, object]:
    """Everything the table has, and the pictures of the first edits for its figure."""
    backbone = load(model, device="cpu", dtype="float32")
    edits, other = held_out_edits(count), list(islice(sample_edits(WARP_SEED, held_out=False), search))
    plain = Way(PLAIN_STEPS, None, 1.0)
    ways = [plain]
    for number in steps:
        for deep in (None, depth):
            asked = [request(edit, i, Way(number, deep, 1.0)) for i, edit in enumerate(other)]
            found = search_warp(backbone, asked, num_inference_steps=number, reference_steps=PLAIN_STEPS)
            note(f"{number} steps, depth {deep}: γ = {found.gamma:g}, {found.psnr:.2f} dB ({found.tried[1.0]:.2f})")
            ways += [Way(number, deep, gamma) for gamma in dict.fromkeys((1.0, found.gamma))]
    pictures = {way: carried_out(backbone, edits, way) for way in ways}
    timed = edits[:1]
    times = race({way.name: lambda way=way: carried_out(backbone, timed, way) for way in ways}, rounds)  # type: ignore[misc]
    whole = {None: weights(model, None), depth: weights(model, depth)}
    lines = []
    for way in ways:
        outcomes = [judge(picture, edit) for picture, edit in zip(pictures[way], edits, strict=True)]
        likeness = [psnr(a, b) for a, b in zip(pictures[way], pictures[plain], strict=True)]
        acceleration = request(edits[0], 0, way).acceleration
        cost = macs(backbone, num_inference_steps=way.steps, acceleration=acceleration).image
        lines.append(
            Line(
                way.name,
                times.ratio(way.name, plain.name).median,
                cost / macs(backbone, num_inference_steps=PLAIN_STEPS).image,
                whole[way.depth] / whole[None],
                None if way == plain else math.fsum(likeness) / len(likeness),
                sum(one.done for one in outcomes) / len(outcomes),
                sum(one.all for one in outcomes) / len(outcomes),
            )
        )
    grid = [[edit.before.picture(), *(pictures[way][i] for way in ways)] for i, edit in enumerate(edits[:6])]
    facts = {"model": model, "edits": count, "depth": depth, "rounds": rounds, "paper": PAPER, "machine": machine()}
    return {"facts": facts, "lines": lines, "grid": grid, "instructions": [edit.instruction for edit in edits[:6]]}


def table(lines: Sequence[Line]) -> str:
    """The lines as Markdown, and the paper's below."""
    rows = ["| run | latency | MACs | weights | to 50 steps | done | with the rest unchanged |"]
    rows.append("| --- | --: | --: | --: | --: | --: | --: |")
    for line in lines:
        changes = [f"{value - 1:+.1%}" if value != 1 else "-" for value in (line.latency, line.macs, line.footprint)]
        likeness = "-" if line.psnr is None else f"{line.psnr:.1f} dB"
        rows.append(f"| {line.name} | {' | '.join(changes)} | {likeness} | {line.done:.1%} | {line.both:.1%} |")
    rows.append(f"| Kim et al., Stable Diffusion | {PAPER['latency']:+.1%} | | {PAPER['footprint']:+.1%} | | | |")
    return "\n".join(rows)


def picture(grid: Sequence[Sequence[Image.Image]], path: Path) -> None:
    """The original and what each way made of it, an edit a line."""
    side, gap = grid[0][0].width, 4
    sheet = Image.new("RGB", (len(grid[0]) * (side + gap), len(grid) * (side + gap)), "white")
    for y, line in enumerate(grid):
        for x, one in enumerate(line):
            sheet.paste(one, (x * (side + gap), y * (side + gap)))
    sheet.save(path)


def main() -> None:
    """Measure, and write edit.json, edit.md and edit.png."""
    given = options(__doc__.splitlines()[0], model="shapes-edit", edits=32, search=6, steps=[5, 10, 20], depth=5)
    count, search, steps = (2, 1, [2]) if given.quick else (given.edits, given.search, given.steps)
    found = measure(given.model, count, search, steps, given.depth, given.rounds or (1 if given.quick else 5))
    given.output.mkdir(parents=True, exist_ok=True)
    lines: list[Line] = found["lines"]  # type: ignore[assignment]
    saved = {**found, "lines": [asdict(line) for line in lines]}
    grid = saved.pop("grid")
    (given.output / "edit.json").write_text(json.dumps(saved, indent=2, default=str) + "\n")
    (given.output / "edit.md").write_text(table(lines) + "\n")
    picture(grid, given.output / "edit.png")  # type: ignore[arg-type]
    print(table(lines))


if __name__ == "__main__":
    main()
