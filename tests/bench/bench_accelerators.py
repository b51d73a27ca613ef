"""How much of what an accelerator saves in MACs it saves in time: target 0.9. `slipstream bench accelerators`"""

from __future__ import annotations

from functools import partial

from matplotlib.figure import Figure

from models import Request
from tests.bench import zoo
from tests.bench.harness import Contender, Spread, note, options, quiet, race
from tests.bench.report import Report, bars
from tests.bench.runs import accelerations, denoise, mac_ratio, request
from tests.bench.zoo import Model

TARGET = 0.9


def measure(model: Model, steps: int, rounds: int) -> tuple[list[dict[str, object]], dict[str, Spread]]:
    """Each accelerator's wall speed-up, its MAC speed-up, and the first over the second."""
    cases = {label: request(model, steps, acceleration) for label, acceleration in accelerations(model, steps).items()}
    held: dict[str, int] = {}

    def run(label: str, one: Request) -> None:
        held[label] = denoise(model, [one])

    contenders: dict[str, Contender] = {label: partial(run, label, one) for label, one in cases.items()}
    timed = race(contenders, rounds, warmup=1 if model.name in zoo.SMALL else 0)
    rows: list[dict[str, object]] = []
    efficiencies = {}
    for label, one in cases.items():
        wall, saved = timed.ratio("none", label), mac_ratio(model, one)
        efficiencies[label] = wall.times(1 / saved)
        rows.append(
            {
                "model": model.name,
                "acceleration": label,
                "ms a step": timed.time(label).times(1000 / steps),
                "wall speed-up": wall,
                "MAC speed-up": saved,
                "efficiency": efficiencies[label],
                "feature KiB": held[label] / 1024,
            }
        )
    return rows, efficiencies


def main() -> None:
    """Measure every accelerator on every model."""
    given = options(__doc__, models=[*zoo.SMALL, *zoo.LARGE], steps=20, steps_large=6)
    quiet()
    report = Report("accelerators", "Wall speed-up over MAC speed-up, one guided image", given)
    found: dict[str, dict[str, Spread]] = {}
    for name in zoo.names(given):
        model = zoo.model(name)
        small = name in zoo.SMALL
        steps = 4 if given.quick else given.steps if small else given.steps_large
        rounds = given.rounds or (1 if given.quick else 7 if small else 3)
        note(f"{name}: {steps} steps, {rounds} rounds")
        if not small:
            denoise(model, [request(model, 1)])  # its first touch of the weights
        rows, found[name] = measure(model, steps, rounds)
        weights = "as bundled" if model.bundled else "random weights"
        report.table(f"{name}, {steps} steps, {weights}", rows)
        below = [f"{label} {spread.median:.2f}" for label, spread in found[name].items() if spread.median < TARGET]
        report.remark(f"{name}: below {TARGET}: {', '.join(below) or 'none'}.")

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(found), squeeze=False)[0]
        for axes, (name, values) in zip(panels, found.items(), strict=True):
            kept = {label: spread for label, spread in values.items() if label != "none"}
            bars(axes, list(kept), list(kept.values()), TARGET)
            axes.set_title(name, fontsize=9)

    report.save(draw, (5 * len(found), 3.5))


if __name__ == "__main__":
    main()
