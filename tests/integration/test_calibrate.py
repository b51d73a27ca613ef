"""Calibrate: the masks that it finds, and profiles of small models, interrupted or not, from Python and the shell."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from app.cli import app
from models import Backbone, Profile, Request, calibrate, generate, load
from models.accelerators import Auto, Forecast, from_mode
from models.errors import RequestError
from models.loading import BUNDLED
from models.quality.metrics import psnr
from models.resolve import least_request, resolve
from models.search.fitting import Fit, fit
from models.search.masks import Grid, influence
from models.search.masks import Path as Recorded
from models.search.recording import record
from models.solvers.tables import table

BackboneOf = Callable[..., Backbone]
PROMPTS = ["a red cat", "two dogs", "a house", "the sea"]


def grid_of(backbone: Backbone, steps: int, order: int, vectors: np.ndarray[Any, Any] | None = None) -> Grid:
    """A DDIM run beside a path of predictions, random ones where none are given."""
    request = least_request(backbone.spec, num_inference_steps=steps, scheduler="ddim")
    schedule = resolve(backbone.spec, backbone.scheduler_config, request).schedule
    if vectors is None:
        vectors = np.random.default_rng(steps + order).standard_normal((steps + 2, 20))
    return Grid(schedule, Recorded(np.array(schedule.times), vectors @ vectors.T), order)


@pytest.mark.parametrize(("steps", "order"), [(7, 0), (8, 1), (8, 2), (7, 3)])
def test_the_dynamic_programme_finds_the_best_mask(steps: int, order: int, backbone_of: BackboneOf) -> None:
    grid = grid_of(backbone_of("sd"), steps, order)

    def cost(mask: tuple[int, ...]) -> float:
        ends = (*mask, steps)
        histories = [tuple(reversed(mask[max(0, k - order) : k + 1])) for k in range(len(mask))]
        return sum(grid.local(history, end) for history, end in zip(histories, ends[1:], strict=True))

    best = grid.best(steps)
    assert sorted(best) == list(range(1, steps + 1))
    for count, mask in best.items():
        masks = ((0, *rest) for rest in combinations(range(1, steps), count - 1))
        assert math.isclose(cost(mask), min(map(cost, masks)), rel_tol=1e-9, abs_tol=1e-12)
        assert len(mask) == count


def test_a_polynomial_is_foretold_exactly(backbone_of: BackboneOf) -> None:
    line = np.arange(10.0)
    vectors = np.zeros((12, 3))
    vectors[:10] = np.stack([line**2, line, np.ones(10)], axis=1)
    for order, exact in ((1, False), (2, True), (3, True)):
        grid = grid_of(backbone_of("sd"), 10, order, vectors)
        assert bool(grid.local((4, 3, 2, 1)[: order + 1], 10) < 1e-9) is exact


@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m", "unipc"])
def test_a_recorded_run_is_made_of_its_predictions(scheduler: str, backbone_of: BackboneOf) -> None:
    """The last latents are the first ones and the predictions, each by its influence."""
    backbone = backbone_of("sd", torch.float64)
    requests = [Request(prompt=p, seed=i, num_inference_steps=6, scheduler=scheduler) for i, p in enumerate(PROMPTS)]
    path, last = record(backbone, requests)
    plain = torch.cat([result.latents for result in generate(backbone, requests)])
    assert torch.equal(last, plain)
    schedule = resolve(backbone.spec, backbone.scheduler_config, requests[0]).schedule
    first, weights = influence(table(schedule))
    off = np.array([*weights, first, -1.0])
    assert off @ path.gram @ off < 1e-9 * path.gram[-1, -1]
    assert off[1:] @ path.gram[1:, 1:] @ off[1:] > 1e-9 * path.gram[-1, -1]


def run(backbone: Backbone, **options: Any) -> Profile:
    """A calibration of four steps on a clock that says one second a look."""
    clock = map(float, itertools.count()).__next__
    return calibrate(backbone, PROMPTS, num_inference_steps=4, reference_steps=6, clock=clock, **options)


def test_a_profile_says_what_was_measured(student_of: BackboneOf) -> None:
    backbone = student_of("sd")
    notes: list[str] = []
    profile = run(backbone, seed=3, progress=lambda done, total, note: notes.append(note))
    assert (profile.config_hash, profile.scheduler) == (backbone.spec.config_hash, "ddim")
    assert (profile.fitted, profile.checked) == (1, 2)
    assert profile.plain.psnr.mean == 100.0
    assert {"unipc-2", "dpmpp_2m-2", "deepcache-2-o1", "student-student"} <= profile.by_name.keys()
    assert notes[:4] == ["recording", "converged", "plain", "searching"]
    assert profile.by_name["unipc-2"].macs * 2 == profile.plain.macs
    assert set(profile.schedules) == {"2of4", "2of8"}
    name = next(name for name in profile.by_name if name.startswith("forecast-2of8"))
    line = profile.by_name[name]
    acceleration = [from_mode(mode) for mode in line.acceleration]
    requests = [
        Request(prompt=p, seed=4 + i, num_inference_steps=8, scheduler="ddim", acceleration=acceleration)
        for i, p in enumerate(PROMPTS[1:2])
    ]
    results = generate(backbone, requests)
    assert (line.evaluations, line.macs) == (2.0, results[0].usage.macs)


def test_what_is_promised_of_a_front_is_measured_on_captions_that_chose_nothing(backbone_of: BackboneOf) -> None:
    backbone = backbone_of("sd")
    profile = run(backbone, seed=3)
    on_fronts = {"plain", *profile.fronts["plain"], *profile.fronts["converged"]}
    assert {one.name for one in profile.all if one.promise is not None} == on_fronts
    name = next(name for name in profile.fronts["converged"] if name != "plain")
    one = profile.by_name[name]

    def drawn(**facts: Any) -> list[Image.Image]:
        requests = [Request(prompt=p, seed=5 + i, **facts) for i, p in enumerate(PROMPTS[2:])]
        return [result.images[0] for result in generate(backbone, requests)]

    modes = [from_mode(mode) for mode in one.acceleration]
    pictures = drawn(num_inference_steps=one.num_inference_steps, scheduler=one.scheduler, acceleration=modes)
    for reference, promised in (
        (drawn(num_inference_steps=4, scheduler="ddim"), one.promised.psnr),
        (drawn(num_inference_steps=6, scheduler="dpmpp_2m"), one.promised.psnr_converged),
    ):
        first, second = (psnr(a, b) for a, b in zip(pictures, reference, strict=True))
        bound = (first + second) / 2 - 31.82 * abs(first - second) / 2  # Student's t, one degree of freedom, 99 %
        assert math.isclose(promised, bound, abs_tol=0.01 + 0.001 * abs(bound))


def test_a_calibration_goes_on_where_it_was_stopped(backbone_of: BackboneOf, tmp_path: Path) -> None:
    backbone = backbone_of("pixart-alpha")
    whole = run(backbone).model_dump_json()

    class Killed(Exception):
        pass

    def stop(at: int) -> Callable[[int, int, str], None]:
        def look(done: int, total: int, note: str) -> None:
            if (note == "plain" and at == 0) or (total and done == at):
                raise Killed

        return look

    for at in (0, 3, 7):
        with pytest.raises(Killed):
            run(backbone, checkpoint=tmp_path / "kept", progress=stop(at))
    with (tmp_path / "kept" / "scores.tsv").open("a") as file:
        file.write("half a line")
    done: list[int] = []
    resumed = run(backbone, checkpoint=tmp_path / "kept", progress=lambda n, total, note: done.append(n))
    assert resumed.model_dump_json() == whole
    promised = [one for one in resumed.all if one.promise is not None]
    lines = (tmp_path / "kept" / "scores.tsv").read_text().splitlines()
    assert len(lines) == len(resumed.all) + len(promised)
    with pytest.raises(RequestError, match="another calibration"):
        run(backbone, checkpoint=tmp_path / "kept", seed=1)


def test_what_is_fitted_is_of_the_profiles_own_scheduler_and_steps(
    backbone_of: BackboneOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Request] = []

    def noted(backbone: Backbone, requests: Sequence[Request]) -> Fit:
        seen.extend(requests)
        return Fit((1.0,) * 8, (1.0, 0.0))

    monkeypatch.setattr("models.search.calibrate.fit", noted)
    clock = map(float, itertools.count()).__next__
    run = {"scheduler": "dpmpp_2m", "num_inference_steps": 8}
    profile = calibrate(backbone_of("pixart-alpha"), PROMPTS, clock=clock, reference_steps=9, **run)  # type: ignore[arg-type]
    assert [(one.scheduler, one.num_inference_steps) for one in seen] == [("dpmpp_2m", 8)]
    assert (profile.mag_ratios, profile.tea_coefficients) == ((1.0,) * 8, (1.0, 0.0))


def test_ratios_and_coefficients_are_of_the_run(backbone_of: BackboneOf) -> None:
    backbone = backbone_of("pixart-alpha", torch.float64)
    fits = {
        scheduler: fit(backbone, [Request(prompt="a red cat", seed=1, scheduler=scheduler, num_inference_steps=9)])
        for scheduler in ("ddim", "dpmpp_2m")
    }
    for found in fits.values():
        assert (len(found.mag_ratios), found.mag_ratios[0], len(found.tea_coefficients)) == (9, 1.0, 5)
        assert found.mag_ratios[-1] == found.mag_ratios[-3]
    assert fits["ddim"] != fits["dpmpp_2m"]


def test_what_cannot_be_calibrated(backbone_of: BackboneOf) -> None:
    with pytest.raises(RequestError, match="scheduler: euler_ancestral draws noise"):
        run(backbone_of("sd"), scheduler="euler_ancestral")
    with pytest.raises(RequestError, match="prompts: 3 is too few"):
        calibrate(backbone_of("sd"), PROMPTS[:3])
    with pytest.raises(RequestError, match="does not take prompts"):
        run(backbone_of("dit"))


def test_the_command_writes_a_profile_and_a_picture(pipeline_dir: Callable[[str], Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    file = tmp_path / "out.json"
    options = ["--steps", "3", "--reference-steps", "4", "--count", "4", "--prompts", str(prompts), "-o", str(file)]
    directory = str(pipeline_dir("sd"))
    result = CliRunner().invoke(app, ["calibrate", "--model", directory, "--device", "cpu", *options])
    assert result.exit_code == 0, result.output
    profile = Profile.load(file)
    assert profile.captions == tuple(PROMPTS)
    assert re.search(r"\d+\s+candidates,\s+\d+\s+schedules,\s+in\s+\d+\s+s\n", result.output)
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.png", "prompts.txt"]
    loaded = load(directory, device="cpu", profiles={"mine": file})
    name, schedule = next(iter(profile.schedules.items()))
    request = Request(
        prompt="x", num_inference_steps=schedule.num_inference_steps, acceleration=Forecast(schedule=name)
    )
    assert resolve(loaded.spec, loaded.scheduler_config, request).evaluations == len(schedule.steps)
    plain, chosen = (
        generate(loaded, [Request(prompt="x", num_inference_steps=3, acceleration=mode)])[0]
        for mode in ((), Auto(prefer="speed"))
    )
    assert chosen.profile is not None
    assert chosen.usage.macs < chosen.usage.macs_unaccelerated == plain.usage.macs


@pytest.mark.parametrize("model", ["shapes-sd", "shapes-dit"])
def test_prompts_are_drawn_from_the_models_grammar(model: str) -> None:
    import json

    from app.commands.calibrate import _prompts
    from models.shapes.shapes import parse_caption

    grammar = json.loads((BUNDLED / model / "slipstream.json").read_text())["prompt_grammar"]
    prompts = _prompts([], grammar, (), 32, 0)
    for prompt in prompts:
        scene = parse_caption(prompt)
        assert scene.background not in [thing.colour for thing in scene.things]
    assert len(set(prompts)) > 20
