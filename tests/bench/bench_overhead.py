"""One request through our library and our engine, over the bare diffusers call. `slipstream bench overhead`

Targets: at most 1.00 through the engine; through HTTP (at most 1.05) see `slipstream bench service`. Every run encodes
a prompt it has never seen, denoises, and decodes to a picture. Steps vary, so that what a request costs once shows
apart from what each step costs.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from models import generate
from tests.bench import peers, zoo
from tests.bench.engine import engine
from tests.bench.harness import Contender, Race, note, options, quiet, race
from tests.bench.report import COLOURS, Report
from tests.bench.runs import fresh_prompt, request
from tests.bench.zoo import Model

ENGINE_TARGET = 1.0


def measure(model: Model, steps: int, rounds: int) -> Race:
    """The same picture three ways, in turns."""
    pipeline = model.pipeline()
    scale = model.backbone.spec.default_guidance_scale

    with engine(model) as served:
        contenders: dict[str, Contender] = {
            "diffusers": lambda: peers.draw(pipeline, fresh_prompt(model), steps, scale),
            "generate": lambda: generate(model.backbone, [request(model, steps, prompt=fresh_prompt(model))]),
            "engine": lambda: served.draw(request(model, steps, prompt=fresh_prompt(model))),
        }
        return race(contenders, rounds, warmup=1)


def main() -> None:
    """Measure every model at every number of steps."""
    given = options(__doc__, models=[*zoo.SMALL, *zoo.LARGE], steps=[5, 25], steps_large=[5])
    quiet()
    report = Report("overhead", "One request, over the bare diffusers call", given)
    rows: list[dict[str, object]] = []
    ratios = {}
    for name in zoo.names(given):
        model, small = zoo.model(name), name in zoo.SMALL
        for steps in [2] if given.quick else given.steps if small else given.steps_large:
            rounds = given.rounds or (1 if given.quick else 15 if small else 3)
            note(f"{name}: {steps} steps, {rounds} rounds")
            timed = measure(model, steps, rounds)
            for way in ("generate", "engine"):
                ratios[f"{name}, {steps} steps, {way}"] = timed.ratio(way, "diffusers")
            rows += [
                {
                    "model": name,
                    "steps": steps,
                    "through": way,
                    "ms": timed.time(way).times(1000),
                    "over diffusers": timed.ratio(way, "diffusers"),
                }
                for way in timed.seconds
            ]
    report.table("One image, text encoding and decoding included", rows)
    above = [f"{label} {ratio}" for label, ratio in ratios.items() if ratio.median > ENGINE_TARGET]
    report.remark(f"Above {ENGINE_TARGET:.2f}: {'; '.join(above) or 'none'}.")

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (label, ratio) in enumerate(ratios.items()):
            error = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
            axes.errorbar(ratio.median, i, xerr=error, fmt="o", color=COLOURS[3 if label.endswith("engine") else 0])
        axes.axvline(ENGINE_TARGET, color=COLOURS[4], linestyle="--", linewidth=1)
        axes.set_yticks(range(len(ratios)), list(ratios), fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("time over diffusers (median and quartiles of paired rounds)")

    report.save(draw)


if __name__ == "__main__":
    main()
