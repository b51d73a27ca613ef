"""Student rows beside base rows in one forward, over base rows alone: at most 5 %. `slipstream bench lora`

Four unguided rows, none, one half or all of them under a LoRA of rank 16 on every attention projection. Beside them
the same by PEFT: an injected adapter and `adapter_names`, its way of mixing adapters in a batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model

from models.accelerators import CfgStudent
from models.denoise import predict
from models.reuse.rows import Conditioning
from tests.bench import zoo
from tests.bench.harness import Contender, Spread, note, options, quiet, race
from tests.bench.report import Report, bars
from tests.bench.runs import request, trajectories
from tests.bench.zoo import Model

ROWS = 4
TARGET = 1.05
BASE = "base rows"


def ours(model: Model, students: int) -> Contender:
    """One forward of `ROWS` rows, the last `students` of them under the adapter."""
    student = CfgStudent(adapter=next(iter(model.backbone.spec.adapters)))
    requests = [_unguided(model, ROWS - students), [request(model, 4, [student], seed=i) for i in range(students)]]
    rows = [
        (row, trajectory) for part in requests for trajectory in trajectories(model, part) for row in trajectory.rows()
    ]
    return partial(torch.inference_mode()(predict), model.backbone, rows)


def _unguided(model: Model, count: int) -> list[Any]:
    from dataclasses import replace

    return [replace(request(model, 4, seed=i), guidance_scale=1.0) for i in range(count)]


class Theirs:
    """diffusers' network with PEFT's adapter injected, as one forward of `ROWS` rows."""

    def __init__(self, model: Model) -> None:
        pipeline = model.pipeline()
        network = pipeline.unet if model.family == "unet" else pipeline.transformer
        config = LoraConfig(r=zoo.RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
        parts = [trajectory.conditioning["conditional"] for trajectory in trajectories(model, _unguided(model, ROWS))]
        conditioning: Conditioning = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        side = network.config.sample_size
        self._latents = torch.randn(ROWS, 4, side, side)
        extra = {} if model.family == "unet" else {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        self._inputs = {"timestep": torch.full((ROWS,), 500), **conditioning, **extra}
        self._network = get_peft_model(network, config).eval()

    @torch.inference_mode()
    def __call__(self, students: int) -> Any:
        """A forward with the last `students` rows under the adapter."""
        names = ["__base__"] * (ROWS - students) + ["default"] * students
        return self._network(self._latents, **self._inputs, adapter_names=names)

    @torch.inference_mode()
    def plain(self) -> Any:
        """The same network with nothing mixed: the adapter disabled."""
        with self._network.disable_adapter():
            return self._network(self._latents, **self._inputs)


def main() -> None:
    """Measure every model."""
    given = options(__doc__, models=[*zoo.SMALL, *zoo.LARGE])
    quiet()
    report = Report("lora", f"{ROWS} rows with students among them, over base rows alone", given)
    found: dict[str, dict[str, Spread]] = {}
    for name in zoo.names(given):
        model = zoo.model(name)
        rounds = given.rounds or (2 if given.quick else 31 if name in zoo.SMALL else 9)
        note(f"{name}: {rounds} rounds")
        theirs = Theirs(model)
        contenders: dict[str, Contender] = {
            BASE: ours(model, 0),
            "half of them students": ours(model, ROWS // 2),
            "all students": ours(model, ROWS),
            "PEFT, adapter disabled": theirs.plain,
            "PEFT, half of them students": partial(theirs, ROWS // 2),
            "PEFT, all students": partial(theirs, ROWS),
        }
        timed = race(contenders, rounds, warmup=2)
        found[name] = {label: timed.ratio(label, BASE) for label in contenders}
        rows: list[dict[str, object]] = [
            {"model": name, "rows": label, "ms": timed.time(label).times(1000), "over base": found[name][label]}
            for label in contenders
        ]
        report.table(f"{name}, {sum(p.numel() for p in model.backbone.network.module.parameters()) / 1e6:.1f} M", rows)
        half = found[name]["half of them students"]
        verdict = "within" if half.median <= TARGET else "above"
        report.remark(f"{name}: half students over base alone {half}, {verdict} the target of {TARGET}.")

    def draw(figure: Figure) -> None:
        for axes, (name, values) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
            bars(axes, list(values), list(values.values()), TARGET)
            axes.set_title(name, fontsize=9)

    report.save(draw, (5 * len(found), 2.6))


if __name__ == "__main__":
    main()
