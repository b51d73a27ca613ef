"""Whether `auto` keeps what it promises, on captions that `calibrate` never saw. `slipstream bench promise`

Every run that a shipped profile chooses for one of the wishes is drawn for 64 captions, and its means are held against
the answer's `promised`. A promise is kept where no likeness is more than 1 dB below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

from models.accelerators import Auto
from models.profiles import Candidate, Profile
from models.profiles.choice import choose, promises
from models.quality.converged import Converged
from tests.bench import zoo
from tests.bench.bench_front import CAPTIONS, Captions
from tests.bench.harness import options, quiet
from tests.bench.report import Report

SHORT = 1.0  # decibels
WISHES = (
    *(Auto(prefer=prefer) for prefer in ("fidelity", "balanced", "speed")),
    *(Auto(min_psnr=least) for least in (40, 45, 50, 55)),
    *(Auto(speedup=times) for times in (1.5, 2, 3)),
)


def choices(profile: Profile) -> dict[str, list[str]]:
    """The names of the candidates that the wishes choose, each with its wishes."""
    found: dict[str, list[str]] = {}
    for wish in WISHES:
        [(field, value)] = wish.model_dump(include={"prefer", "min_psnr", "speedup"}, exclude_none=True).items()
        found.setdefault(choose(profile, wish)[0].name, []).append(f"{field} {value:g}" if field != "prefer" else value)
    return found


def mean(values: Sequence[float]) -> str:
    """With its standard error."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{fmean(values):.1f} ± {error:.1f}"


def line(captions: Captions, profile: Profile, one: Candidate, wishes: Sequence[str]) -> tuple[dict[str, object], bool]:
    """A row, and whether its promise is kept."""
    drawn, promised = captions.candidate(one), promises(profile, one)
    over = min(
        fmean(drawn.to_plain) - promised["psnr"],
        fmean(drawn.to_converged) - promised["psnr_converged"],
    )
    row: dict[str, object] = {
        "asked for": ", ".join(wishes),
        "chosen": f"`{one.name}`",
        "fewer MACs": f"{promised['speedup']:.2f}x",
        "to plain": mean(drawn.to_plain),
        "promised": f"{promised['psnr']:.1f}",
        "to converged": mean(drawn.to_converged),
        "promised ": f"{promised['psnr_converged']:.1f}",
        "alignment": f"{fmean(drawn.aligned):.1%}",
        "promised  ": f"{promised['alignment']:.1%}" if "alignment" in promised else "",
        "least above": f"{over:+.1f}",
    }
    return row, over >= -SHORT


def main() -> None:
    """Both bundled models, the solvers of their profiles."""
    given = options(
        __doc__, models=["shapes-sd", "shapes-dit"], schedulers=["ddim", "dpmpp_2m"], captions=CAPTIONS, steps=25
    )
    quiet()
    report = Report("promise", "What auto promises, and what it keeps", given)
    count = 2 if given.quick else given.captions
    kept, total = 0, 0
    for name in zoo.names(given):
        backbone = zoo.model(name).backbone
        converged = Converged(backbone, given.output / "converged", steps=20 if given.quick else 200)
        for scheduler in given.schedulers:
            size = (backbone.spec.native_width, backbone.spec.native_height)
            profile = backbone.spec.profile(scheduler, given.steps, *size)
            if profile is None:
                report.remark(f"{name}: no profile for {scheduler}")
                continue
            captions = Captions(backbone, scheduler, given.steps, count, converged)
            lines = [line(captions, profile, profile.by_name[one], wishes) for one, wishes in choices(profile).items()]
            kept, total = kept + sum(well for _, well in lines), total + len(lines)
            about = f"{name}, {scheduler}, {given.steps} steps, {count} captions, PSNR in dB"
            report.table(about, [row for row, _ in lines])
    report.remark(f"{kept} of {total} choices keep both likenesses to {SHORT:g} dB of what is promised or do better.")
    report.save()


if __name__ == "__main__":
    main()
