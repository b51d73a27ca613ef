"""A profile as a picture: likeness by cost, with the front."""

from __future__ import annotations

from pathlib import Path

from models.profiles.profile import Candidate, Likeness, Profile

KINDS = {"forecast": ("o", "C0"), "plain steps": (".", "0.6"), "caches and students": ("^", "C1")}


def draw(profile: Profile, path: str | Path) -> None:
    """Save a plot of every candidate: times fewer MACs than the plain run across, PSNR up, the front as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels: tuple[tuple[Likeness, str], ...] = (
        ("plain", f"PSNR to the plain {profile.num_inference_steps}-step picture, dB"),
        ("converged", f"PSNR to the converged picture ({profile.reference_steps} steps), dB"),
    )
    for axes, (to, label) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.set(xlabel="times fewer MACs than the plain run", ylabel=label)
        axes.grid(alpha=0.3)
        shown = profile.candidates if to == "plain" else profile.all
        for kind, (marker, colour) in KINDS.items():
            points = [(profile.plain.macs / one.macs, one.likeness(to)) for one in shown if _kind(one) == kind]
            if points:
                x, y = zip(*points, strict=True)
                errors = [measure.error for measure in y]
                axes.errorbar(x, [m.mean for m in y], errors, fmt=marker, color=colour, label=kind, alpha=0.7)
        front = [one for one in profile.front(to) if one in shown]
        line = [(profile.plain.macs / one.macs, one.likeness(to).mean) for one in front]
        axes.plot(*zip(*line, strict=True), "-", color="C3", linewidth=1, label="front")
    axes.legend(frameon=False)
    count = len(profile.captions) - profile.fitted - profile.checked
    figure.suptitle(f"{profile.model}, {profile.scheduler}, {count} pictures a point")
    figure.savefig(path, dpi=90)


def _kind(candidate: Candidate) -> str:
    modes = {mode["mode"] for mode in candidate.acceleration}
    if not modes:
        return "plain steps"
    return "forecast" if modes == {"forecast"} else "caches and students"
