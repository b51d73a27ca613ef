"""The profile file: the measured front of speed against fidelity of one model, and what was fitted on the way.

A profile belongs to one network (by its config hash), scheduler, number of steps, size and guidance scale. All in it
was measured on `captions` by `calibrate`; nothing here touches a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from models.errors import ModelLoadError
from models.reuse.weights import Basis

Likeness = Literal["plain", "converged"]
"""What a picture is compared with: the plain run of the same seed, or a plain run of `reference_steps`."""
MAX_BYTES = 2**20
"""A profile file is at most this large; the bundled ones have less than a tenth of it."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+:=,-]*$", max_length=120)]
Count = Annotated[int, Field(ge=1, le=1000)]
Mode = dict[str, JsonValue]
"""An accelerator as a request gives it: an object with `mode`."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Measure(_Value):
    """A mean over pictures, and its standard error."""

    mean: float
    error: float = Field(0.0, ge=0)


class Promise(_Value):
    """What the means over other captions are at least, with 99 % confidence: lower bounds over the checked captions."""

    psnr: float
    ssim: float
    psnr_converged: float
    alignment: float | None = None


class Candidate(_Value):
    """One way to draw a picture, and what it measured. MACs and evaluations are those of one image, on average."""

    name: Name
    scheduler: str
    num_inference_steps: Count
    acceleration: tuple[Mode, ...] = Field((), max_length=8, description="Mode objects, as a request's.")
    evaluations: float = Field(gt=0, description="Steps with a forward.")
    macs: int = Field(gt=0)
    seconds: float = Field(gt=0, description="Time over the plain run's, measured side by side.")
    psnr: Measure = Field(description="To the plain picture, decibels; 100 where it is the same.")
    ssim: Measure = Field(description="To the plain picture.")
    psnr_converged: Measure = Field(description="To the converged picture of the same seed, decibels.")
    alignment: Measure | None = Field(None, description="Share of pictures that keep all claims; None: no judge.")
    promise: Promise | None = Field(None, description="Of those on a front: by captions that chose nothing.")

    @property
    def promised(self) -> Promise:
        """What may be promised: two standard errors below the means where no checked captions say better."""
        if self.promise is not None:
            return self.promise
        measures = (self.psnr, self.ssim, self.psnr_converged, self.alignment)
        psnr, ssim, converged, aligned = (None if m is None else m.mean - 2 * m.error for m in measures)
        return Promise.model_validate({"psnr": psnr, "ssim": ssim, "psnr_converged": converged, "alignment": aligned})

    def likeness(self, to: Likeness) -> Measure:
        """PSNR in decibels to the plain or to the converged picture."""
        return self.psnr if to == "plain" else self.psnr_converged


class Schedule(_Value):
    """Which steps of a run are computed by `forecast {schedule: name}`, and how the others are foretold."""

    num_inference_steps: Count
    num_steps: Count = Field(description="Evaluations of the same run without a forecast.")
    steps: tuple[Annotated[int, Field(ge=0, lt=1000)], ...] = Field(min_length=1, max_length=1000)
    order: int = Field(ge=0, le=4)
    basis: Basis = "newton"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.steps) != sorted(set(self.steps)) or self.steps[0] != 0 or self.steps[-1] >= self.num_steps:
            raise ValueError(f"steps must begin with 0, rise, and stay below {self.num_steps}")
        return self


class Profile(_Value):
    """See the module. `plain` is the run that all others are held against: `num_inference_steps` steps in full."""

    schema_version: Literal[1] = 1
    model: str
    config_hash: str
    scheduler: str
    num_inference_steps: Count
    width: int = Field(ge=1)
    height: int = Field(ge=1)
    guidance_scale: float = Field(ge=0)
    reference_scheduler: str
    reference_steps: Count = Field(description="Plain steps of the converged run.")
    captions: tuple[str, ...] = Field(min_length=1, max_length=4096)
    fitted: int = Field(ge=0, description="The first so many captions fitted; the next chose and measured.")
    checked: int = Field(0, ge=0, description="The last so many captions only say what may be promised.")
    seed: int = Field(0, ge=0)
    plain: Candidate
    candidates: tuple[Candidate, ...] = Field(max_length=1000)
    fronts: dict[Likeness, tuple[Name, ...]] = Field(description="Names, cheapest first, none dominated.")
    schedules: dict[Name, Schedule] = Field(default_factory=dict, max_length=200)
    mag_ratios: tuple[float, ...] = Field((), max_length=1000, description="MagCache's, one a step, the first 1.")
    tea_coefficients: tuple[float, ...] = Field((), max_length=8, description="TeaCache's, highest power first.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [candidate.name for candidate in self.all]
        if len(names) != len(set(names)):
            raise ValueError("candidates: two of the same name")
        wanted: tuple[Likeness, ...] = ("plain", "converged")
        for to in wanted:
            if list(self.fronts.get(to, ())) != [one.name for one in pareto(self.all, to)]:
                raise ValueError(f"fronts.{to}: not the candidates that no other one dominates")
        if self.fitted + self.checked > len(self.captions):
            raise ValueError(f"fitted and checked: {self.fitted} and {self.checked} of {len(self.captions)} captions")
        return self

    @property
    def all(self) -> tuple[Candidate, ...]:
        """The plain run and all candidates."""
        return (self.plain, *self.candidates)

    @cached_property
    def by_name(self) -> dict[str, Candidate]:
        """Each of `all` by its name."""
        return {candidate.name: candidate for candidate in self.all}

    def front(self, to: Likeness = "plain") -> tuple[Candidate, ...]:
        """The candidates that no other one dominates in MACs and likeness, cheapest first; the plain run may be one."""
        return tuple(self.by_name[name] for name in self.fronts[to])

    def differences(
        self, scheduler: str, num_inference_steps: int, width: int, height: int, guidance_scale: float | None = None
    ) -> list[str]:
        """What a run has otherwise than this profile, a phrase each; empty where it was measured for just that run."""
        size, given = f"{self.width}x{self.height}", f"{width}x{height}"
        facts: list[tuple[str, Any, Any]] = [
            ("scheduler", self.scheduler, scheduler),
            ("num_inference_steps", self.num_inference_steps, num_inference_steps),
            ("size", size, given),
        ]
        if guidance_scale is not None:
            facts.append(("guidance_scale", self.guidance_scale, guidance_scale))
        return [f"{name}: measured with {ours}, not {theirs}" for name, ours, theirs in facts if ours != theirs]

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile file. Raises `ModelLoadError` where it is not one."""
        try:
            with Path(path).open("rb") as file:
                content = file.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES:
                raise ModelLoadError(f"not a profile: {path}: it has more than {MAX_BYTES} bytes")
            return cls.model_validate_json(content)
        except (OSError, ValidationError) as error:
            raise ModelLoadError(f"not a profile: {path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON, one line a candidate and a schedule, so that two can be compared."""
        Path(path).write_text(_lines(self.model_dump(mode="json", exclude_none=True)) + "\n")


def _lines(facts: dict[str, Any]) -> str:
    parts = []
    for name, value in facts.items():
        if name == "candidates":
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            parts.append(f'  "candidates": [\n{rows}\n  ]')
        elif name == "schedules":
            rows = ",\n".join(f"    {json.dumps(key)}: {json.dumps(row)}" for key, row in value.items())
            parts.append(f'  "schedules": {{\n{rows}\n  }}')
        else:
            parts.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}"


def pareto(candidates: Iterable[Candidate], to: Likeness) -> list[Candidate]:
    """Those that are more like the reference than every other that costs no more, cheapest first.

    Of equals in cost and likeness the first by name stands.
    """
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda one: (one.macs, -one.likeness(to).mean, one.name)):
        if not front or candidate.likeness(to).mean > front[-1].likeness(to).mean:
            front.append(candidate)
    return front


def nearest(
    profiles: Sequence[Profile],
    scheduler: str,
    num_inference_steps: int,
    width: int,
    height: int,
    guidance_scale: float | None = None,
) -> Profile | None:
    """The profile of this scheduler that was measured closest by: in guidance scale where one is given, then in size,
    then in steps; None without one."""
    same = [profile for profile in profiles if profile.scheduler == scheduler]

    def distance(profile: Profile) -> tuple[float, ...]:
        steps = abs(profile.num_inference_steps - num_inference_steps)
        exact = (profile.width, profile.height) != (width, height)
        scale = 0.0 if guidance_scale is None else abs(profile.guidance_scale - guidance_scale)
        return scale, exact, abs(profile.width * profile.height - width * height), steps, profile.num_inference_steps

    return min(same, key=distance, default=None)
