"""Choosing from a profile: plain data in, a candidate out. Nothing dominated is ever chosen.

Two comparisons are measured. `min_psnr` asks for likeness to the plain picture; all other wishes for likeness to the
converged one, which the best solver may come nearer to in fewer steps than the plain run does. Runs are compared by
their means over the same captions; what a client is told, and `min_psnr`, go by what may be promised. (After DiffServe,
arXiv:2411.15381, where load decides how much work a picture gets.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from models.accelerators.auto import Auto, Prefer
from models.errors import NoProfile, OutOfRange, RequestError
from models.profiles.profile import Candidate, Likeness, Profile, pareto

LOSSES: Mapping[Prefer, float] = {"fidelity": 0.0, "balanced": 2.0, "speed": 5.0}
"""Decibels that a run may be farther from the converged picture than the plain run is."""
QUALITIES: Mapping[str, Prefer | None] = {"low": "speed", "medium": "balanced", "high": "fidelity", "auto": None}
"""OpenAI's `quality` as what `auto` prefers; None: the model's default, which is no acceleration."""
DEADLINE_SHARE = 0.8
"""Of a deadline: later than this a flexible request does not plan to be done."""


@dataclass(frozen=True)
class Outlook:
    """What a server expects of a run, in seconds: until it has the device to itself at the latest, for one plain step
    of all its images, and from now to its deadline. `slack` is how many times longer runs took than their steps say."""

    wait: float = 0.0
    step: float = 0.0
    deadline: float | None = None
    slack: float = 1.0

    def plain(self, profile: Profile) -> float:
        """Seconds for the plain run of a profile, to be on the safe side."""
        return self.slack * self.step * profile.plain.evaluations


@dataclass(frozen=True)
class Chosen:
    """What was chosen from which profile, what that promises, how the run differs from the one that was measured (a
    phrase each), and whether the deadline made it cheaper than was wished for."""

    name: str
    candidate: str
    promised: Mapping[str, float]
    differences: Sequence[str] = field(default=())
    moved: bool = False


def choose(
    profile: Profile, wish: Auto, outlook: Outlook | None = None, refused: Iterable[str] = ()
) -> tuple[Candidate, bool]:
    """The candidate that meets the wish, none of the `refused`, and whether it is cheaper than that for the deadline.

    Raises an `OutOfRange` where nothing meets it.
    """
    out = set(refused)
    to: Likeness = "converged" if wish.min_psnr is None else "plain"
    front = pareto([one for one in profile.all if one.name not in out], to)  # cheapest first, each better than the last
    found = _wished(profile, front, wish, outlook)
    if not wish.flexible or outlook is None or outlook.deadline is None:
        return found, False
    plain = outlook.plain(profile)
    room = DEADLINE_SHARE * outlook.deadline - outlook.wait
    if found.seconds * plain <= room:
        return found, False
    cheaper = front[: front.index(found) + 1]
    moved = next((one for one in reversed(cheaper) if one.seconds * plain <= room), front[0])
    return moved, moved is not found


def _wished(profile: Profile, front: Sequence[Candidate], wish: Auto, outlook: Outlook | None) -> Candidate:
    plain = profile.plain
    if wish.preference is not None:
        least = plain.psnr_converged.mean - LOSSES[wish.preference]
        return next((one for one in front if one.psnr_converged.mean >= least), front[-1])
    if wish.min_psnr is not None:
        best = max(one.promised.psnr for one in front)
        return _first(
            (one for one in front if one.promised.psnr >= wish.min_psnr), "min_psnr", f"{best:.1f} dB is the most"
        )
    best_first = front[::-1]
    if wish.speedup is not None:
        most = plain.macs / front[0].macs
        return _first(
            (one for one in best_first if one.macs * wish.speedup <= plain.macs), "speedup", f"{most:.2f} is the most"
        )
    if outlook is None:
        raise RequestError("acceleration.max_seconds", "is for a server, which knows how fast it is; give another wish")
    budget, unit = wish.max_seconds or 0.0, outlook.plain(profile)
    least = outlook.wait + unit * min(one.seconds for one in front)
    return _first(
        (one for one in best_first if outlook.wait + one.seconds * unit <= budget),
        "max_seconds",
        f"{least:.2f} s is the least that is predicted now, of which {outlook.wait:.2f} s are others' work",
    )


def _first(candidates: Iterable[Candidate], wish: str, limit: str) -> Candidate:
    found = next(iter(candidates), None)
    if found is None:
        raise OutOfRange(f"acceleration.{wish}", f"nothing that was measured meets it: {limit}")
    return found


def promises(profile: Profile, candidate: Candidate) -> dict[str, float]:
    """What a profile says of a candidate: likeness in decibels at least, and how much less it computes than the plain
    run."""
    facts = candidate.promised.model_dump(exclude_none=True) | {"speedup": profile.plain.macs / candidate.macs}
    return {name: round(value, 4) for name, value in facts.items()}


def find(
    profiles: Mapping[str, Profile], closest: Profile | None, run: Mapping[str, object], wish: Auto, model: str
) -> tuple[str, Profile, list[str]]:
    """The name of the profile for a run, the profile, and how the run differs from what it was measured with.

    `run` has the scheduler, num_inference_steps, width, height and guidance_scale; `closest` is what the model has
    nearest to it. Raises `NoProfile` where that is not near enough: for `prefer`, steps and size may differ.
    """
    name = next((name for name, profile in profiles.items() if profile is closest), "")
    differences = [] if closest is None else closest.differences(**run)  # type: ignore[arg-type]
    allowed = ("num_inference_steps", "size") if wish.preference is not None else ()
    if closest is None or any(not phrase.startswith(allowed) for phrase in differences):
        size = f"{run['width']}x{run['height']}"
        command = f"slipstream calibrate --model {model} --scheduler {run['scheduler']} "
        command += f"--steps {run['num_inference_steps']} --size {size} -o profile.json"
        known = "; ".join(differences) or f"profiles: {', '.join(profiles) or 'none'}"
        raise NoProfile("acceleration", f"{model} has no profile for this run ({known}); `{command}` makes one")
    return name, closest, differences
