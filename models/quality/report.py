"""An evaluation as files: JSON, a Markdown table, a plot of speed against fidelity, and a contact sheet."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from models.quality.evaluate import Evaluation, Score
from models.quality.metrics import Likeness

Measure = Callable[[Score], float | None]

CELL = 64  # pixels a picture of the contact sheet; larger ones are reduced
LABEL = 250  # pixels for the name of a run
PLAIN_RUNS = (
    (("baseline", "same_macs", "full_steps"), ".-", "plain runs of fewer steps"),
    (("best_solver",), ".--", "the same of the best solver"),
)
OF_STUDENTS = {"unguided": "kx", "teacher": "k+"}
PANELS: tuple[tuple[str, Measure], ...] = (
    ("alignment, %", lambda score: None if score.alignment is None else 100 * score.alignment["all"]),
    ("Fréchet distance (lower is better)", lambda score: score.frechet),
    ("PSNR to the plain picture, dB", lambda score: score.to_plain.psnr if score.to_plain else None),
    ("PSNR to the converged picture, dB", lambda score: score.to_converged.psnr if score.to_converged else None),
)


def write(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write evaluation.json, table.md, tradeoff.png and contact.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("evaluation.json", "table.md", "tradeoff.png", "contact.png")]
    files[0].write_text(json.dumps(as_json(evaluation), indent=2) + "\n")
    files[1].write_text(table(evaluation))
    plot(evaluation, files[2])
    contact_sheet(evaluation, files[3])
    return files


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Every number, for other tools."""
    return {
        "model": evaluation.model,
        "pictures": evaluation.pictures,
        "device": evaluation.device,
        "dtype": evaluation.dtype,
        "scheduler": evaluation.scheduler,
        "converged_steps": evaluation.converged_steps,
        "runs": [_line(score) for score in evaluation.scores],
    }


def _line(score: Score) -> dict[str, Any]:
    case = score.case
    return {
        "label": case.label,
        "kind": case.kind,
        "control_of": case.of,
        "num_inference_steps": case.num_inference_steps,
        "scheduler": case.scheduler,
        "guidance_scale": case.guidance_scale,
        "acceleration": [accelerator.model_dump(by_alias=True, mode="json") for accelerator in case.accelerators],
        "evaluations": score.evaluations,
        "rows": score.rows,
        "macs": score.macs,
        "mac_ratio": score.mac_ratio,
        "seconds": score.seconds,
        "speedup": score.speedup,
        "to_plain": score.to_plain and asdict(score.to_plain),
        "to_converged": score.to_converged and asdict(score.to_converged),
        "alignment": score.alignment,
        "frechet": score.frechet,
    }


COLUMNS = ("run", "steps", "evaluations", "GMACs", "fewer MACs", "wall", "PSNR to plain", "SSIM", "PSNR to converged",
           "SSIM", "alignment", "Fréchet")  # fmt: skip


def table(evaluation: Evaluation) -> str:
    """A Markdown table; controls stand below their acceleration, in italics."""
    lines = [list(COLUMNS), ["---", *["--:"] * (len(COLUMNS) - 1)]]
    for score in evaluation.scores:
        control = score.case.kind not in ("baseline", "accelerated")
        name = f"`{score.case.label}`" if score.case.kind == "accelerated" else score.case.label
        lines.append(
            [
                f"↳ *{name}*" if control else name,
                str(score.case.num_inference_steps),
                str(score.evaluations),
                f"{score.macs / 1e9:.3g}",
                f"{score.mac_ratio:.2f}x",
                f"{score.speedup:.2f}x",
                *_likeness(score.to_plain),
                *_likeness(score.to_converged),
                _number(score.alignment["all"] if score.alignment else None, ".1%"),
                _number(score.frechet, ".2f"),
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _likeness(likeness: Likeness | None) -> tuple[str, str]:
    return ("–", "–") if likeness is None else (f"{likeness.psnr:.1f}", f"{likeness.ssim:.3f}")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def plot(evaluation: Evaluation, file: Path) -> None:
    """Speed (in MACs, which no busy machine can blur) against fidelity; lines join plain runs of fewer steps."""
    shown = [(name, measure) for name, measure in PANELS if any(measure(s) is not None for s in evaluation.scores)]
    figure = Figure(figsize=(5.0 * len(shown) + 2.8, 4.4), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (name, measure) in zip(panels, shown, strict=True):
        axes.set(xlabel="times fewer MACs than the plain run", ylabel=name)
        axes.grid(alpha=0.3)
        points = [(s, measure(s)) for s in evaluation.scores]
        for kinds, style, name in PLAIN_RUNS:
            line = sorted({(s.mac_ratio, y) for s, y in points if y is not None and _is_plain(s, kinds)})
            axes.plot([x for x, _ in line], [y for _, y in line], style, color="0.6", label=name)
        for number, (score, y) in enumerate((s, y) for s, y in points if s.case.kind == "accelerated"):
            marker = "osD^vP*X"[number // 10 % 8]
            axes.plot(score.mac_ratio, y, marker, color=f"C{number % 10}", label=score.case.label, markersize=7)
        for score, y in points:
            if (marker := OF_STUDENTS.get(score.case.kind, "")) and y is not None:
                axes.plot(score.mac_ratio, y, marker, label=score.case.label)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(f"{evaluation.model}, {evaluation.pictures} pictures a point")
    figure.savefig(file, dpi=90)


def _is_plain(score: Score, kinds: tuple[str, ...]) -> bool:
    return score.case.kind in kinds and not score.case.accelerators


def contact_sheet(evaluation: Evaluation, file: Path) -> None:
    """The same captions and seeds in every column, a run a row."""
    rows, columns = len(evaluation.scores), len(evaluation.samples[0])
    sheet = Image.new("RGB", (LABEL + columns * (CELL + 2), rows * (CELL + 2)), "white")
    brush, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for row, (score, pictures) in enumerate(zip(evaluation.scores, evaluation.samples, strict=True)):
        top = row * (CELL + 2)
        control = score.case.kind not in ("baseline", "accelerated")
        text = score.case.label.replace("+", "\n+ ")
        place = (24 if control else 6, top + CELL // 2)
        brush.text(place, text, fill="dimgrey" if control else "black", font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            small = picture if picture.width == CELL else picture.resize((CELL, CELL))
            sheet.paste(small, (LABEL + column * (CELL + 2), top + 1))
    sheet.quantize(256).save(file, optimize=True)
