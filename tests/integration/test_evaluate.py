"""An evaluation from the command line to its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from app.commands import evaluate as command
from models import Backbone
from models.accelerators import DeepCache
from models.errors import RequestError
from models.quality import evaluate
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
    kinds = ["accelerated", "same_macs", "zeros", "full_steps"]
    assert [run["kind"] for run in found["runs"]] == ["baseline", *kinds, *kinds]
    assert [run["label"] for run in found["runs"] if run["kind"] == "accelerated"] == runs
    assert {run["control_of"] for run in found["runs"]} == {None, *runs}
    assert found["pictures"] == 2
    plain, cached = found["runs"][:2]
    assert (plain["mac_ratio"], plain["psnr"], plain["rows"]) == (1.0, None, 8)
    assert cached["mac_ratio"] > 1.3
    assert cached["psnr"] > 0
    assert len((tmp_path / "table.md").read_text().splitlines()) == 2 + len(found["runs"])
    for name in ("tradeoff.png", "contact.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100


@pytest.mark.parametrize("text", ["deepcache:interval=0", "delta_dit", "cfg_student:adapter=nobody"])
def test_what_does_not_fit_is_said_before_anything_runs(
    text: str, cli: typer.Typer, pipeline_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = ["--model", str(pipeline_dir("sd")), "--acceleration", text, "-o", str(tmp_path), "--captions", "2"]
    result = CliRunner().invoke(cli, ["evaluate", *arguments])
    assert result.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_model_of_another_world_needs_prompts(backbone_of: Callable[..., Backbone]) -> None:
    with pytest.raises(RequestError, match="captions"):
        evaluate(backbone_of("sd"), [[DeepCache()]], captions=4, judge=ShapesJudge())


def test_pictures_outside_the_world_of_shapes_are_only_compared(backbone_of: Callable[..., Backbone]) -> None:
    captions = ["a large red circle on a white background"]
    evaluation = evaluate(backbone_of("pixart-alpha"), captions=captions, judge=ShapesJudge(), num_inference_steps=3)
    assert all(score.alignment is None and score.frechet is None for score in evaluation.scores)
    assert all(score.ssim is not None for score in evaluation.scores[1:])
