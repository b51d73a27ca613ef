"""The figures of a GPU: ticks, MFU, memory, accelerators, synchronisations, compiling. `slipstream bench gpu`

Stable Diffusion 1.5, SDXL, DiT-XL/2 and PixArt-Sigma architectures with random weights in bf16. Without a GPU only
`--device cpu --quick` runs, on tiny stand-ins, to show that the script works.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure

from app.engine.pace import pays
from models import advance, generate
from models.costs.macs import counts_of
from models.reuse.plans import RowPlan
from tests.bench.gpu_checks import compiled, graphed, running, synchronisations, timed
from tests.bench.gpu_models import MODELS, PEAK_TFLOPS, gpu_model
from tests.bench.harness import Contender, elapsed, machine, note, options, quiet, race
from tests.bench.report import Report, lines
from tests.bench.runs import accelerations, denoise, mac_ratio, request
from tests.bench.zoo import Model

TINY = ("sd-tiny", "dit-tiny")


def ticks(model: Model, most: int, peak: float) -> tuple[list[dict[str, object]], dict[int, float]]:
    """Time a tick, share of the card's matrix rate, and memory, by rows; stops where memory does."""
    spec = model.backbone.spec
    flops = 2 * counts_of(model.backbone, spec.native_width, spec.native_height).row(RowPlan())
    found: list[dict[str, object]] = []
    seconds: dict[int, float] = {}
    rows = 2
    while rows <= most:
        try:
            step = timed(model, partial(advance, model.backbone, running(model, rows // 2)))
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            for _ in range(2):
                step()
            seconds[rows] = statistics.median(elapsed(step) for _ in range(10))
        except torch.OutOfMemoryError:
            break
        rate = flops * rows / seconds[rows]
        memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        found.append(
            {
                "model": model.name,
                "rows": rows,
                "ms a tick": 1000 * seconds[rows],
                "ms a row": 1000 * seconds[rows] / rows,
                "TFLOP/s": rate / 1e12,
                "MFU": rate / 1e12 / peak if peak else None,
                "peak GiB": memory,
            }
        )
        rows *= 2
    return found, seconds


def efficiency(model: Model, steps: int, rounds: int) -> list[dict[str, object]]:
    """Wall speed-up over MAC speed-up of every accelerator, and diffusers' own call beside it."""
    cases = {label: request(model, steps, a) for label, a in accelerations(model, steps).items()}
    contenders: dict[str, Contender] = {
        label: timed(model, partial(denoise, model, [one])) for label, one in cases.items()
    }
    result = race(contenders, rounds)
    return [
        {
            "model": model.name,
            "acceleration": label,
            "ms a step": result.time(label).times(1000 / steps),
            "wall speed-up": result.ratio("none", label),
            "MAC speed-up": mac_ratio(model, one),
            "efficiency": result.ratio("none", label).times(1 / mac_ratio(model, one)),
        }
        for label, one in cases.items()
    ]


def against_diffusers(model: Model, steps: int, rounds: int) -> dict[str, object]:
    """One whole picture by us over the bare pipeline call."""
    pipeline: Any = model.pipeline()
    given: dict[str, Any] = dict(model.given)
    if (label := given.pop("class_label", None)) is not None:
        given["class_labels"] = [label]
    else:
        given["height"] = given["width"] = model.backbone.spec.native_width
        if model.backbone.spec.layout == "pixart":
            given |= {"use_resolution_binning": False, "negative_prompt": None}
            for name in ("prompt", "negative_prompt"):
                if (embeds := given.get(f"{name}_embeds")) is not None:
                    given[f"{name}_attention_mask"] = torch.ones(embeds.shape[:2])
    for key, value in given.items():
        if isinstance(value, torch.Tensor):
            given[key] = value.to(model.backbone.device, model.backbone.dtype)
    theirs = timed(model, lambda: pipeline(**given, num_inference_steps=steps))
    ours = timed(model, lambda: generate(model.backbone, [request(model, steps)]))
    result = race({"diffusers": theirs, "ours": ours}, rounds)
    return {
        "model": model.name,
        "s by diffusers": result.time("diffusers"),
        "ours over it": result.ratio("ours", "diffusers"),
    }


def main() -> None:
    """Every model, or those named."""
    given = options(
        __doc__,
        models=list(MODELS),
        device="cuda",
        dtype="bfloat16",
        steps=20,
        most=64,
        contiguous=False,
        peak_tflops=0.0,
    )
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench gpu needs a CUDA device, and there is none. To try the script: --device cpu --quick")
    quiet()
    card = str(machine().get("gpu", ""))
    peak = given.peak_tflops or next((rate for name, rate in PEAK_TFLOPS.items() if name in card), 0.0)
    report = Report("gpu", f"On {card or given.device}, {given.dtype}", given)
    report.remark(f"Matrix rate taken as {peak:g} TFLOP/s." if peak else "Matrix rate unknown: no MFU (--peak-tflops).")
    steps, rounds = (4, 1) if given.quick else (given.steps, given.rounds or 5)
    rows: dict[str, list[dict[str, object]]] = {}
    curves: dict[str, dict[float, float]] = {}
    for name in TINY if given.quick else given.models:
        note(name)
        model = gpu_model(name, given.device, "float32" if given.quick else given.dtype, not given.contiguous)
        found, seconds = ticks(model, 4 if given.quick else given.most, peak)
        rows.setdefault("Ticks", []).extend(found)
        report.remark(f"{name}: {pays({n: s / n for n, s in seconds.items()})} rows a tick pay.")
        curves[name] = {float(n): s / n / (seconds[2] / 2) for n, s in seconds.items()}
        rows.setdefault("Host synchronisations in a mixed tick", []).append(synchronisations(model))
        rows.setdefault("Accelerators", []).extend(efficiency(model, steps, rounds))
        rows.setdefault("Whole pictures", []).append(against_diffusers(model, steps, rounds))
        if given.device == "cuda":
            rows.setdefault("CUDA graph of a plain forward", []).append(graphed(model))
            rows.setdefault("Regional compilation", []).append(compiled(model, 4))
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    for title, table in rows.items():
        report.table(title, table)

    def draw(figure: Figure) -> None:
        lines(figure.subplots(), curves, "rows a tick", "time a row, over that at 2 rows", log="x")

    report.save(draw, (7, 4.5))


if __name__ == "__main__":
    main()
