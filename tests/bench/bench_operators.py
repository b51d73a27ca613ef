"""Operators that a tick dispatches, for 1 and for 32 trajectories: on a GPU each would be a launch.

`slipstream bench operators`. Counted with a dispatch mode on the CPU, in `batched` stepping and in `exact`: counts, not
times. The step counted is one between two full ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from models import Backbone, Request, advance
from models.accelerators import DeepCache, DeltaDiT, DiTFastAttn
from models.accelerators.base import Accelerator
from models.generate import start
from models.resolve import resolve
from tests.bench import zoo
from tests.bench.harness import note, options, quiet
from tests.bench.report import Report
from tests.operators import operators

STEPS = 25
MANY = 32


def count(backbone: Backbone, images: int, scheduler: str, acceleration: Sequence[Accelerator]) -> int:
    """Operators of the second step."""
    wanted = Request(
        prompt=next(iter(backbone.spec.examples), "a picture"),
        num_images=images,
        num_inference_steps=STEPS,
        scheduler=scheduler,
        acceleration=acceleration,
    )
    trajectories = start(backbone, resolve(backbone.spec, backbone.scheduler_config, wanted))
    advance(backbone, trajectories)
    return operators(lambda: advance(backbone, trajectories))


def cases(backbone: Backbone) -> list[tuple[str, str, Sequence[Accelerator]]]:
    """Plain steps under every scheduler, then steps of caches under DDIM."""
    found: list[tuple[str, str, Sequence[Accelerator]]] = [("plain", name, ()) for name in backbone.spec.schedulers]
    if backbone.spec.family == "unet":
        return [*found, ("shallow DeepCache", "ddim", [DeepCache(interval=3)])]
    found.append(("cached Δ-DiT", "ddim", [DeltaDiT(interval=2)]))
    plans = [name for name, plan in backbone.spec.plans.items() if plan.num_inference_steps == STEPS]
    return found + [(f"plan {name}", "ddim", [DiTFastAttn.model_validate({"plan": name})]) for name in plans]


def main() -> None:
    """Every bundled model."""
    given = options(__doc__, models=["shapes-sd", "shapes-dit"])
    quiet()
    report = Report("operators", "Operators of a tick", given)
    many = 4 if given.quick else MANY
    for name in zoo.names(given):
        note(name)
        backbone = zoo.model(name).backbone
        table = []
        for what, scheduler, acceleration in cases(backbone):
            row: dict[str, object] = {"step": what, "scheduler": scheduler}
            for stepping in ("batched", "exact"):
                stepped = replace(backbone, stepping=stepping)
                for images in (1, many):
                    row[f"{stepping}, {images}"] = count(stepped, images, scheduler, acceleration)
            table.append(row)
        report.table(name, table)
    report.save()


if __name__ == "__main__":
    main()
