"""What every option of a command becomes, with the work behind it replaced by a record of what it was asked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

import models
import models.quality
import models.training
from app.cli import app as cli
from app.commands import search
from app.commands.options import parse_named, parse_size, read_prompts
from models import Plan
from models.accelerators import Auto, DeepCache, SelectiveGuidance
from models.profiles.choice import Chosen
from models.search.warp_search import Warp
from tests.unit.specs import class_spec, dit_spec, unet_spec

Asked = dict[str, Any]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What a command asked of the library, by function; nothing is loaded or drawn."""
    asked: Asked = {"spec": unet_spec(examples=("one", "two", "three"))}

    def load(name: str, **options: Any) -> Any:
        asked["load"] = {"name": name, **options}
        return SimpleNamespace(spec=asked["spec"])

    def generate(backbone: Any, requests: Any, *, progress: Any) -> Any:
        [asked["request"]] = requests
        progress(1, 2)
        pictures = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(asked["request"].num_images)]
        usage = SimpleNamespace(steps=4, rows=8, macs=1.5e9, macs_unaccelerated=6e9)
        seeds = range(7, 7 + len(pictures))
        return [SimpleNamespace(images=pictures, seeds=seeds, usage=usage, profile=asked.get("chosen"))]

    def search_plan(backbone: Any, requests: Any, **options: Any) -> Plan:
        asked["plan"] = {"requests": requests, **options}
        options["checkpoint"].write_text("{}")
        options["progress"](1, 2)
        return Plan.model_validate(
            {
                "model": "dit",
                "config_hash": "hash",
                "scheduler": "ddim",
                "num_inference_steps": 1,
                "tokens": 64,
                "guidance": True,
                "window": 8,
                "threshold": 0.1,
                "table": [["full"]],
            }
        )

    def search_warp(backbone: Any, requests: Any, **options: Any) -> Warp:
        asked["warp"] = {"requests": requests, **options}
        options["progress"](1.2, 31.0)
        return Warp(1.2, 31.25, {1.0: 30.5, 1.2: 31.25})

    def distill(model: str, output: Path, **options: Any) -> Path:
        asked["distill"] = {"model": model, "output": output, **options}
        output.write_bytes(b"x" * 1_250_000)
        return output

    for name, fake in [("load", load), ("generate", generate), ("search_plan", search_plan)]:
        monkeypatch.setattr(models, name, fake)
    monkeypatch.setattr(models, "search_warp", search_warp)
    monkeypatch.setattr(models.training, "distill", distill)
    return asked


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def said(result: Any) -> str:
    """What was printed, without boxes and line breaks."""
    return " ".join("".join(" " if c in "│╭╮╰╯─" else c for c in result.output).split())


def test_generate_asks_for_what_its_options_say(asked: Asked, tmp_path: Path) -> None:
    Image.new("RGBA", (6, 4), "red").save(tmp_path / "start.png")
    output = tmp_path / "drawn.webp"
    words = "generate ring --model m --steps 9 --guidance-scale 3.5 --negative-prompt dull --seed 5 --num-images 2"
    words += " --scheduler euler --size 48X64 --strength 0.3 --timestep-warp 0.5 --class-label 4"
    words += " --acceleration deepcache:interval=4 --acceleration selective_guidance:stop=0.5"
    words += " --adapter a=/x --adapter b=/y --plan p=/z.json --profile q=/m.json"
    words += " --device cpu --dtype float16 --stepping batched"
    result = run(*words.split(), "--image", tmp_path / "start.png", "-o", output)
    assert result.exit_code == 0, result.output
    assert asked["load"] == {
        "name": "m",
        "device": "cpu",
        "dtype": "float16",
        "stepping": "batched",
        "adapters": {"a": "/x", "b": "/y"},
        "controls": {},
        "plans": {"p": "/z.json"},
        "profiles": {"q": "/m.json"},
        "config": None,
    }
    request = asked["request"]
    assert (request.prompt, request.negative_prompt, request.class_label) == ("ring", "dull", 4)
    assert (request.width, request.height, request.num_inference_steps) == (48, 64, 9)
    assert (request.guidance_scale, request.seed, request.num_images) == (3.5, 5, 2)
    assert (request.scheduler, request.strength, request.timestep_warp) == ("euler", 0.3, 0.5)
    assert request.accelerators == (DeepCache(interval=4), SelectiveGuidance(stop=0.5))
    assert (request.image.size, request.image.mode) == ((6, 4), "RGB")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["drawn-0.webp", "drawn-1.webp", "start.png"]
    assert "seed 7" in said(result)
    assert "seed 8" in said(result)
    assert "4 steps, 8 rows, 1.500 GMACs (75% saved)" in said(result)


def test_generate_says_what_was_chosen(asked: Asked, tmp_path: Path) -> None:
    promised = {"psnr": 41.25, "speedup": 2.0}
    asked["chosen"] = Chosen("ddim-25", "forecast-9", promised, ("num_inference_steps: measured with 25, not 20",))
    result = run("generate", "a ring", "--acceleration", "auto:speedup=2,flexible=true", "-o", tmp_path / "drawn.png")
    assert result.exit_code == 0, result.output
    assert asked["request"].accelerators == (Auto(speedup=2.0, flexible=True),)
    assert "chosen: forecast-9 of ddim-25; promised: psnr 41.25, speedup 2" in said(result)
    assert "measured with 25, not 20" in said(result)
    run("generate", "a ring", "--quality", "medium", "-o", tmp_path / "drawn.png")
    assert (asked["request"].quality, asked["request"].accelerators) == ("medium", ())


def test_generates_defaults_are_the_requests(asked: Asked, tmp_path: Path) -> None:
    output = tmp_path / "drawn.png"
    assert run("generate", "a ring", "-o", output).exit_code == 0
    auto = dict.fromkeys(("device", "dtype", "stepping"), "auto")
    options: Asked = {**auto, "adapters": {}, "controls": {}, "plans": {}, "profiles": {}, "config": None}
    assert asked["load"] == {"name": "shapes-sd", **options}
    bare, found = vars(models.Request(prompt="a ring")), vars(asked["request"])
    assert found | {"acceleration": ()} == bare
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--size", "64"], "is not WIDTHxHEIGHT"),
        (["--size", "64x-1"], "is not WIDTHxHEIGHT"),
        (["--adapter", "lonely"], "is not NAME=PATH"),
        (["--plan", "a="], "is not NAME=PATH"),
        (["--image", "/nowhere.png"], "/nowhere.png"),
    ],
)
def test_generate_refuses_what_it_cannot_read(options: list[str], reason: str, asked: Asked) -> None:
    result = run("generate", "a ring", *options)
    assert result.exit_code == 2
    assert reason in said(result)
    assert "load" not in asked


def test_plan_calibrates_on_the_models_examples(asked: Asked, tmp_path: Path) -> None:
    asked["spec"] = dit_spec(examples=("one", "two", "three"))
    output = tmp_path / "D2.json"
    words = "plan --threshold 0.05 --model m --steps 9 --window 3 --metric signed --guidance-scale 2 --scheduler euler"
    words += " --size 48x64 --count 4 --device cpu --dtype float32"
    result = run(*words.split(), "-o", output, "--picture", tmp_path / "plan.png")
    assert result.exit_code == 0, result.output
    assert asked["load"] == {"name": "m", "device": "cpu", "dtype": "float32"}
    found = asked["plan"]
    assert [(r.prompt, r.seed) for r in found["requests"]] == [("one", 0), ("two", 1), ("three", 2), ("one", 3)]
    for request in found["requests"]:
        assert (request.width, request.height, request.num_inference_steps) == (48, 64, 9)
        assert (request.guidance_scale, request.scheduler) == (2.0, "euler")
    assert (found["threshold"], found["window"], found["metric"]) == (0.05, 3, "signed")
    assert found["checkpoint"] == tmp_path / "D2.search.json"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["D2.json", "plan.png"]
    assert Plan.load(output).model == "dit"


def test_plan_calibrates_on_classes_spread_over_all(asked: Asked, tmp_path: Path) -> None:
    asked["spec"] = class_spec(num_classes=1000)
    result = run("plan", "--threshold", "0.1", "-o", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    assert [(r.class_label, r.seed) for r in asked["plan"]["requests"]] == [(0, 0), (250, 1), (500, 2), (750, 3)]
    assert asked["load"]["name"] == "shapes-dit"
    assert asked["plan"]["metric"] == "paper"
    assert asked["plan"]["window"] is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [(["--metric", "l2"], "--metric"), (["--threshold", "-1"], "threshold"), (["--count", "0"], "count")],
)
def test_plan_refuses(options: list[str], reason: str, asked: Asked) -> None:
    result = run("plan", "--threshold", "0.1", *options)
    assert result.exit_code == 2
    assert reason in said(result)
    assert "load" not in asked


def test_prompts_are_the_lines_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a ring\n\n  a star  \n")
    assert read_prompts(file) == ["a ring", "a star"]
    assert read_prompts(None) == []
    assert search._prompts(["a ring", "a star"], ("an example",), 3) == ["a ring", "a star", "a ring"]
    assert search._prompts([], ("x", "y"), 1) == ["x"]
    with pytest.raises(typer.BadParameter, match="no examples"):
        search._prompts([], (), 1)
    file.write_text("\n \n")
    with pytest.raises(typer.BadParameter, match="has no prompts"):
        read_prompts(file)


def test_warp_takes_the_pictures_of_a_folder(asked: Asked, tmp_path: Path) -> None:
    for i, name in enumerate(["b.png", "a.JPG", "c.webp", "d.png"]):
        Image.new("RGB", (8 + i, 8)).save(tmp_path / name, "png")
    (tmp_path / "notes.txt").write_text("no picture")
    checkpoint = tmp_path / "tried.json"
    words = "--model m --steps 5 --reference-steps 20 --strength 0.4 --guidance-scale 3 --count 3 --dtype float32"
    result = run("warp", "--images", tmp_path, *words.split(), "--checkpoint", checkpoint)
    assert result.exit_code == 0, result.output
    found = asked["warp"]
    assert [(r.prompt, r.seed, r.image.width) for r in found["requests"]] == [
        ("one", 0, 9),
        ("two", 1, 8),
        ("three", 2, 10),
    ]
    assert {(r.strength, r.guidance_scale) for r in found["requests"]} == {(0.4, 3.0)}
    assert (found["num_inference_steps"], found["reference_steps"]) == (5, 20)
    assert found["checkpoint"] == checkpoint
    assert "γ = 1.2 PSNR 31.25 dB, without warp 30.50 dB" in said(result)


def test_warp_needs_pictures(asked: Asked, tmp_path: Path) -> None:
    result = run("warp", "--images", tmp_path)
    assert result.exit_code == 2
    assert "no PNG, JPEG or WebP" in said(result)


def test_distill_asks_for_what_its_options_say(asked: Asked, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "student"
    prompts.write_text("a ring\n\n a star \n")
    (a := tmp_path / "a").touch()
    (b := tmp_path / "b").touch()
    words = "distill --model m --guidance-scale 3 --rank 2 --steps 5 --batch 6 --learning-rate 0.01 --relative --muon"
    words += f" --data own --start-from {a} --start-from {b} --num-inference-steps 7 --ema-decay 0.5 --seed 8"
    words += " --precision bfloat16 --device cpu"
    result = run(*words.split(), "--prompts", prompts, "-o", output)
    assert result.exit_code == 0, result.output
    assert asked["distill"] == {
        "model": "m",
        "output": output,
        "guidance_scale": 3.0,
        "rank": 2,
        "steps": 5,
        "batch": 6,
        "learning_rate": 0.01,
        "relative": True,
        "muon": True,
        "data": "own",
        "start_from": [a, b],
        "prompts": ["a ring", "a star"],
        "num_inference_steps": 7,
        "ema_decay": 0.5,
        "seed": 8,
        "precision": "bfloat16",
        "device": "cpu",
    }
    assert "(1.25 MB)" in result.output


@pytest.mark.parametrize(("rank", "code"), [(0, 2), (1, 0), (256, 0), (257, 2)])
def test_the_ranks_that_distill_takes(rank: int, code: int, asked: Asked, tmp_path: Path) -> None:
    assert run("distill", "--model", "m", "--rank", str(rank), "-o", tmp_path / "student").exit_code == code


def test_distills_defaults(asked: Asked, tmp_path: Path) -> None:
    assert run("distill", "--model", "m", "-o", tmp_path / "student").exit_code == 0
    found = asked["distill"]
    assert (found["guidance_scale"], found["rank"], found["steps"], found["batch"]) == (None, 8, 1000, 16)
    assert (found["learning_rate"], found["relative"], found["muon"]) == (None, False, False)
    assert (found["data"], found["start_from"], found["prompts"]) == ("trajectories", (), [])
    assert (found["num_inference_steps"], found["ema_decay"], found["seed"]) == (None, 0.0, 0)


@pytest.mark.parametrize(
    ("text", "size"), [(None, (None, None)), ("64x48", (64, 48)), ("8X16", (8, 16)), ("100x7", (100, 7))]
)
def test_sizes(text: str | None, size: tuple[int | None, int | None]) -> None:
    assert parse_size(text) == size


def test_named_files_may_hold_an_equals_sign() -> None:
    assert parse_named(["a=/x=y", "b=z"], "--plan") == {"a": "/x=y", "b": "z"}
    assert parse_named(None, "--plan") == {}


def test_the_catalog_lists_what_is_bundled() -> None:
    result = CliRunner().invoke(cli, ["models"], env={"COLUMNS": "300", "TERM": "dumb"})
    assert result.exit_code == 0
    rows = {line.split("│")[1].strip(): line for line in result.output.splitlines() if "shapes" in line and "│" in line}
    assert "StableDiffusionPipeline" in rows["shapes-sd"]
    assert "PixArtAlphaPipeline" in rows["shapes-dit"]
    assert "StableDiffusionInstructPix2PixPipeline" in rows["shapes-edit"]
    assert [name for name, row in rows.items() if "guidance-2" in row] == ["shapes-dit", "shapes-sd"]
    assert "PixArtSigmaPipeline" in result.output.splitlines()[-1]


def test_accelerators_are_listed_with_their_parameters() -> None:
    result = CliRunner().invoke(cli, ["accelerators"], env={"COLUMNS": "300", "TERM": "dumb"})
    assert result.exit_code == 0
    for text in ("interval = 3", "depth = required", "adapter = auto", "stop = 0.8", "arxiv.org/abs/2312.00858"):
        assert text in result.output
    assert "mode =" not in result.output


def test_bench_runs_the_named_one_with_what_follows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "bench"
    folder.mkdir(parents=True)
    for name in ("harness", "bench_cpu", "bench_lora"):
        (folder / f"{name}.py").touch()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    commands: list[Any] = []

    def ran(command: list[str], **options: Any) -> Any:
        commands.append((command[1:], options["cwd"]))
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr("subprocess.run", ran)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    assert run("bench").output.split() == ["cpu", "lora"]
    assert run("bench", "cpu", "--quick", "--sizes", "3").exit_code == 3
    assert run("bench", "lora").exit_code == 3
    assert commands == [
        (["-m", "tests.bench.bench_cpu", "--quick", "--sizes", "3"], tmp_path),
        (["-m", "tests.bench.bench_lora"], tmp_path),
    ]
    assert run("bench", "nothing").exit_code == 2
    monkeypatch.chdir("/")
    assert run("bench", "cpu").exit_code == 2
