"""An evaluation from the command line to its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from app.commands import evaluate as command
from models import Backbone, Request, Result, generate
from models.accelerators import DeepCache
from models.errors import RequestError
from models.quality import converged, evaluate
from models.quality.converged import Converged
from models.shapes.judge import ShapesJudge


@pytest.fixture
def cli() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)
    command.register(app)
    return app


def test_a_small_run_writes_every_file(cli: typer.Typer, pipeline_dir: Callable[[str], Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue star\n")
    runs = ["deepcache:interval=2", "deepcache:interval=2+selective_guidance:stop=0.5"]
    arguments = ["--model", str(pipeline_dir("sd")), "--steps", "4", "--prompts", str(prompts), "-o", str(tmp_path)]
    arguments += ["--device", "cpu", *(word for run in runs for word in ("--acceleration", run))]
    result = CliRunner().invoke(cli, ["evaluate", *arguments])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "evaluation.json").read_text())
    kinds = ["accelerated", "same_macs", "best_solver", "zeros", "full_steps"]
    assert [run["kind"] for run in found["runs"]] == ["baseline", *kinds, *kinds]
    assert [run["label"] for run in found["runs"] if run["kind"] == "accelerated"] == runs
    assert {run["control_of"] for run in found["runs"]} == {None, *runs}
    assert found["pictures"] == 2
    plain, cached = found["runs"][:2]
    assert (plain["mac_ratio"], plain["to_plain"], plain["rows"]) == (1.0, None, 8)
    assert cached["mac_ratio"] > 1.3
    assert cached["to_plain"]["psnr"] > 0
    assert plain["to_converged"]["psnr"] > 0
    assert len(list((tmp_path / "converged").glob("*.png"))) == 2
    assert len((tmp_path / "table.md").read_text().splitlines()) == 2 + len(found["runs"])
    for name in ("tradeoff.png", "contact.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("deepcache:interval=0", "interval: '0' of deepcache is not allowed"),
        ("delta_dit", "delta_dit"),
        ("cfg_student:adapter=nobody", "nobody"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(
    text: str, words: str, cli: typer.Typer, pipeline_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a red circle\na blue square\n")
    arguments = ["--model", str(pipeline_dir("sd")), "--acceleration", text, "-o", str(output)]
    result = CliRunner().invoke(cli, ["evaluate", *arguments, "--prompts", str(prompts)])
    assert isinstance(result.exception, RequestError)
    assert words in str(result.exception)
    assert not output.exists()


def test_converged_pictures_are_drawn_once(
    backbone_of: Callable[..., Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int | None] = []

    def counted(backbone: Backbone, requests: Sequence[Request]) -> list[Result]:
        drawn.extend(request.num_inference_steps for request in requests)
        return generate(backbone, requests)

    monkeypatch.setattr(converged, "generate", counted)
    backbone = backbone_of("sd")
    asked = [Request(prompt="a red circle", seed=seed, num_inference_steps=3) for seed in (1, 2)]
    first = Converged(backbone, tmp_path, steps=5).pictures(asked)
    again = Converged(backbone, tmp_path, steps=5).pictures([*asked[::-1], replace(asked[0], seed=3)])
    assert drawn == [5, 5, 5]
    limits = [replace(one, num_inference_steps=5, scheduler="dpmpp_2m") for one in asked]
    wanted = [result.images[0] for result in generate(backbone, limits)]
    assert [one.tobytes() for one in first] == [one.tobytes() for one in wanted]
    assert [one.tobytes() for one in again[:2]] == [one.tobytes() for one in first[::-1]]
    Converged(backbone, tmp_path, steps=6).pictures(asked[:1])
    assert drawn[3:] == [6]
    with pytest.raises(ValueError, match="euler_ancestral"):
        Converged(backbone, tmp_path).pictures([replace(asked[0], scheduler="euler_ancestral")])


def test_a_model_of_another_world_needs_prompts(backbone_of: Callable[..., Backbone]) -> None:
    with pytest.raises(RequestError, match="captions"):
        evaluate(backbone_of("sd"), [[DeepCache()]], captions=4, judge=ShapesJudge())


def test_pictures_outside_the_world_of_shapes_are_only_compared(backbone_of: Callable[..., Backbone]) -> None:
    captions = ["a large red circle on a white background"]
    evaluation = evaluate(
        backbone_of("pixart-alpha"), captions=captions, judge=ShapesJudge(), num_inference_steps=3, scheduler="lcm"
    )
    assert all(score.alignment is None and score.frechet is None for score in evaluation.scores)
    assert all(score.to_plain is not None and score.to_converged is None for score in evaluation.scores[1:])
