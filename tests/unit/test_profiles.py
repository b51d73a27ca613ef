"""Profiles: what a file may hold, its fronts, which one fits a run, and how a model takes and refuses them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models import Profile, load
from models.accelerators import Forecast
from models.errors import ModelLoadError, NoProfile
from models.loading import BUNDLED
from models.profiles import Candidate, Measure, nearest, pareto
from models.profiles.profile import MAX_BYTES
from models.reuse.plans import Recall
from models.reuse.sites import OUTPUT
from models.shapes.validation import held_out_captions
from models.spec import ModelSpec, RunSpec
from tests.unit.specs import dit_spec, run_spec


def candidate(name: str, macs: int, psnr: float, converged: float | None = None, **facts: Any) -> dict[str, Any]:
    """One line of a profile."""
    return {
        "name": name,
        "scheduler": "ddim",
        "num_inference_steps": 25,
        "evaluations": 25.0,
        "macs": macs,
        "seconds": 1.0,
        "psnr": {"mean": psnr},
        "ssim": {"mean": 0.9, "error": 0.01},
        "psnr_converged": {"mean": psnr if converged is None else converged, "error": 0.5},
        **facts,
    }


FACTS: dict[str, Any] = {
    "model": "dit",
    "config_hash": "hash",
    "scheduler": "ddim",
    "num_inference_steps": 25,
    "width": 64,
    "height": 32,
    "guidance_scale": 2.0,
    "reference_scheduler": "ddim",
    "reference_steps": 200,
    "captions": ["a", "b"],
    "fitted": 1,
    "plain": candidate("plain", 100, 100.0, 45.0),
    "candidates": [
        candidate("dear", 60, 30.0, 46.0, scheduler="unipc"),
        candidate("k13", 52, 55.0, 44.0, acceleration=[{"mode": "forecast", "evaluations": 13}]),
        candidate("cheap", 20, 30.0, 20.0, alignment={"mean": 0.9}),
    ],
    "fronts": {"plain": ["cheap", "k13", "plain"], "converged": ["cheap", "k13", "dear"]},
    "schedules": {"k13": {"num_inference_steps": 25, "num_steps": 25, "steps": [0, 3, 24], "order": 2}},
    "mag_ratios": [1.0, 0.9],
    "tea_coefficients": [0.5, 1.0],
}


def write(folder: Path, **changes: Any) -> Path:
    """A file with these facts."""
    file = folder / "profile.json"
    file.write_text(json.dumps(FACTS | changes))
    return file


def test_a_file_is_read_and_written_as_it_is(tmp_path: Path) -> None:
    profile = Profile.load(write(tmp_path))
    assert [one.name for one in profile.front("plain")] == ["cheap", "k13", "plain"]
    assert [one.name for one in profile.front("converged")] == ["cheap", "k13", "dear"]
    assert profile.by_name["dear"].likeness("converged") == Measure(mean=46.0, error=0.5)
    assert profile.schedules["k13"].steps == (0, 3, 24)
    profile.save(tmp_path / "copy.json")
    assert Profile.load(tmp_path / "copy.json") == profile
    text = (tmp_path / "copy.json").read_text()
    assert sum('"psnr"' in line for line in text.splitlines()) == 4  # a line a candidate


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"schema_version": 2}, "schema_version"),
    ({"more": 1}, "more"),
    ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"captions": []}, "captions"),
    ({"fitted": 3}, "3 and 0 of 2 captions"),
    ({"checked": 2}, "1 and 2 of 2 captions"),
    ({"fronts": {"plain": ["plain"], "converged": ["cheap", "k13", "dear"]}}, "fronts.plain"),
    ({"fronts": {"plain": ["cheap", "k13", "plain"]}}, "fronts.converged"),
    ({"candidates": [candidate("plain", 1, 1.0)]}, "two of the same name"),
    ({"candidates": [candidate("../x", 1, 1.0)]}, "candidates.0.name"),
    ({"candidates": [candidate("x", 0, 1.0)]}, "candidates.0.macs"),
    ({"candidates": [candidate("x", 1, float("nan"))]}, "candidates.0.psnr.mean"),
    ({"schedules": {"a": {"num_inference_steps": 9, "num_steps": 9, "steps": [1], "order": 1}}}, "begin with 0"),
    ({"schedules": {"a": {"num_inference_steps": 9, "num_steps": 9, "steps": [0, 9], "order": 1}}}, "stay below 9"),
    ({"model": "m" * MAX_BYTES}, "more than 1048576 bytes"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_is_no_profile(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"not a profile: .*profile\.json") as caught:
        Profile.load(write(tmp_path, **changes))
    assert reason in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"lost\.json"):
        Profile.load(tmp_path / "lost.json")


def test_the_front_has_what_nothing_dominates() -> None:
    draw = random.Random(3)
    for _ in range(50):
        values = [(draw.randint(1, 9), draw.randint(1, 9), draw.randint(1, 9)) for _ in range(12)]
        lines = [Candidate.model_validate(candidate(f"c{i}", m, p, c)) for i, (m, p, c) in enumerate(values)]
        for to in ("plain", "converged"):
            front = pareto(lines, to)
            dominated = {
                one.name
                for one in lines
                for other in lines
                if other.macs <= one.macs
                and other.likeness(to).mean >= one.likeness(to).mean
                and (other.macs, other.likeness(to).mean) != (one.macs, one.likeness(to).mean)
            }
            best = {(one.macs, one.likeness(to).mean) for one in lines if one.name not in dominated}
            assert [(one.macs, one.likeness(to).mean) for one in front] == sorted(best)


def test_which_profile_is_closest() -> None:
    def profile(**changes: Any) -> Profile:
        return Profile.model_validate(FACTS | changes)

    small, many, large = profile(), profile(num_inference_steps=50), profile(width=512, height=512)
    other = profile(scheduler="dpmpp_2m")
    spec = dit_spec(profiles={"a": small, "b": many, "c": large, "d": other})
    assert spec.profile("ddim", 25, 64, 32) is small
    assert spec.profile("ddim", 40, 64, 32) is many
    assert spec.profile("ddim", 30, 64, 32) is small
    assert spec.profile("ddim", 50, 512, 448) is large
    assert spec.profile("dpmpp_2m", 1, 8, 8) is other
    assert spec.profile("unipc", 25, 64, 32) is None
    strong = profile(guidance_scale=5.0)
    both = dit_spec(profiles={"a": small, "e": strong})
    assert both.profile("ddim", 25, 64, 32, 5.0) is strong
    assert both.profile("ddim", 25, 64, 32, 2.0) is small
    assert nearest([], "ddim", 25, 64, 32) is None
    assert small.differences("ddim", 25, 64, 32, 2.0) == []
    assert small.differences("ddim", 30, 64, 64, 3.0) == [
        "num_inference_steps: measured with 25, not 30",
        "size: measured with 64x32, not 64x64",
        "guidance_scale: measured with 2.0, not 3.0",
    ]


def test_a_model_takes_its_profiles(pipeline_dir: Callable[[str], Path], tmp_path: Path) -> None:
    directory = pipeline_dir("pixart-alpha")
    digest = load(str(directory), device="cpu", dtype="float32").spec.config_hash
    given = write(tmp_path, config_hash=digest)
    beside = tmp_path / "model"
    beside.mkdir()
    for part in directory.iterdir():
        (beside / part.name).symlink_to(part)
    (beside / "profiles").mkdir()
    (beside / "profiles" / "ddim-25.json").write_text(given.read_text())
    spec = load(str(beside), device="cpu", dtype="float32", profiles={"mine": given}).spec
    assert list(spec.profiles) == ["ddim-25", "mine"]
    assert spec.profiles["mine"].by_name["k13"].macs == 52
    with pytest.raises(ModelLoadError, match=r"profile mine .* another network: its config hash is hash, the model's"):
        load(str(directory), device="cpu", profiles={"mine": write(tmp_path)})
    strange = candidate("k13", 52, 55.0, acceleration=[{"mode": "forecast", "interval": 0}])
    fronts = {"plain": ["k13", "plain"], "converged": ["k13"]}
    strange_file = write(tmp_path, config_hash=digest, candidates=[strange], fronts=fronts)
    with pytest.raises(ModelLoadError, match=r"candidate k13: acceleration\.interval: .* greater than or equal to 1"):
        load(str(directory), device="cpu", profiles={"mine": strange_file})


def scheduled() -> ModelSpec:
    """A model whose profile has one schedule for runs of 25 steps of ddim."""
    return dit_spec(profiles={"a": Profile.model_validate(FACTS)})


def test_a_forecast_takes_its_schedule_from_the_profile() -> None:
    forecast = Forecast(schedule="k13").bind(scheduled(), run_spec(25))
    assert [step for step in range(25) if not forecast.plan(step, 25).reuse] == [0, 3, 24]
    assert forecast.plan(5, 25).reuse == {OUTPUT: Recall(2, "newton")}
    assert (forecast.schedule, forecast.order) == ("k13", 2)
    own = Forecast(schedule="k13", order=1, basis="taylor", warmup=2).bind(scheduled(), run_spec(25))
    assert own.plan(5, 25).reuse == {OUTPUT: Recall(1, "taylor")}
    assert not own.plan(1, 25).reuse
    with pytest.raises(ValueError, match="bind"):
        Forecast(schedule="k13").plan(1, 25)


MISMATCHED: list[tuple[RunSpec, str, str]] = [
    (run_spec(25), "lost", r"dit has no schedule 'lost' for ddim \(found by calibrate: k13\)"),
    (run_spec(25, scheduler="euler"), "k13", r"no schedule 'k13' for euler \(found by calibrate: none\)"),
    (run_spec(24), "k13", "num_inference_steps: the schedule is for 25, the request has 24"),
    (run_spec(25, num_steps=20), "k13", "steps: the schedule is for 25, the request has 20"),
    (run_spec(25, timestep_warp=2.0), "k13", "timestep_warp: the schedule is for 1.0, the request has 2.0"),
]


@pytest.mark.parametrize(("run", "name", "reason"), MISMATCHED, ids=[reason[:20] for *_, reason in MISMATCHED])
def test_a_schedule_is_for_its_runs_alone(run: RunSpec, name: str, reason: str) -> None:
    with pytest.raises(NoProfile, match=reason) as caught:
        Forecast(schedule=name).bind(scheduled(), run)
    assert caught.value.field == "acceleration.schedule"


@pytest.mark.parametrize("model", ["shapes-sd", "shapes-dit"])
def test_the_bundled_models_have_profiles_of_other_captions_than_they_are_judged_by(model: str) -> None:
    spec = load(model, device="cpu", dtype="float32").spec  # checks the network's hash, and that the fronts are fronts
    assert set(spec.profiles) == {"ddim-25", "dpmpp_2m-25"}
    for name, profile in spec.profiles.items():
        assert (BUNDLED / model / "profiles" / f"{name}.json").stat().st_size < 100_000
        assert name == f"{profile.scheduler}-{profile.num_inference_steps}"
        assert (profile.width, profile.height, profile.guidance_scale) == (64, 64, spec.default_guidance_scale)
        assert not set(profile.captions) & set(held_out_captions(64))
        assert {"unipc-13", "unipc-10", "unipc-8"} < profile.by_name.keys()
        assert (len(set(profile.captions)), profile.fitted, profile.checked) == (62, 16, 30)
        for one in (*profile.front("plain"), *profile.front("converged")):
            assert one.promise is not None
            assert one.promise.psnr_converged < one.psnr_converged.mean + 2
        assert len(profile.mag_ratios) == (profile.num_inference_steps if spec.family == "dit" else 0)
        for schedule in profile.schedules.values():
            assert len(schedule.steps) in (13, 10, 8)
