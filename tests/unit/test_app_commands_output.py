"""The commands: what the library is asked for, which files are written, and the numbers that are printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

import models
from app.cli import app
from app.commands.options import parse_named, parse_size
from models import Request
from models.accelerators import DeepCache, SelectiveGuidance
from models.costs.macs import Usage
from models.loading import BUNDLED
from tests.faked import COLOURS

UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
    "norm_num_groups": 4,
}
DIT: dict[str, Any] = {
    "_class_name": "DiTTransformer2DModel",
    "sample_size": 16,
    "num_layers": 4,
    "patch_size": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_embeds_ada_norm": 10,
}


def slipstream(*arguments: str) -> Result:
    """Run the command line; wide, so that no table is broken."""
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, list(arguments))


class Library:
    """Stands in for `models.load` and `models.generate`: remembers what it is asked for and paints flat pictures."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.loaded: list[tuple[str, dict[str, Any]]] = []
        self.requests: list[Request] = []
        patch.setattr(models, "load", self.load)
        patch.setattr(models, "generate", self.generate)

    def load(self, name: str, **options: Any) -> str:
        self.loaded.append((name, options))
        return f"backbone of {name}"

    def generate(self, backbone: str, requests: list[Request], progress: Any) -> list[models.Result]:
        assert backbone == f"backbone of {self.loaded[-1][0]}"
        [request] = requests
        self.requests.append(request)
        progress(3, 9)
        images = [Image.new("RGB", (6, 4), COLOURS[i]) for i in range(request.num_images)]
        seeds = tuple(request.seed + i for i in range(request.num_images))
        usage = Usage(steps=12, rows=34, macs=2_500_000_000, macs_unaccelerated=10_000_000_000, evaluations=12)
        return [models.Result(images, None, seeds, (), usage)]  # type: ignore[arg-type]


def written(folder: Path) -> dict[str, Any]:
    """The colours of the pictures in a folder by name."""
    return {path.name: Image.open(path).getpixel((0, 0)) for path in folder.iterdir()}


def test_generate_asks_for_all_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library, start = Library(monkeypatch), tmp_path / "start.png"
    Image.new("RGBA", (9, 5), (10, 20, 30, 40)).save(start)
    out = tmp_path / "out"
    out.mkdir()
    ran = slipstream(
        "generate", "a ring", "--model", "m", "--steps", "12", "--guidance-scale", "2.5", "--negative-prompt", "dull",
        "--seed", "70", "--num-images", "3", "--scheduler", "euler", "--size", "24x40", "--image", str(start),
        "--mask", str(start),
        "--strength", "0.6", "--timestep-warp", "0.5", "--class-label", "4", "--acceleration", "deepcache:interval=2",
        "--acceleration", "selective_guidance:stop=0.5", "--adapter", "s=a/b", "--adapter", "t=c=d", "--plan", "p=e",
        "--config", "configs", "--device", "cpu", "--dtype", "float32", "-o", str(out / "ring.v1.png"),
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    files = {
        "adapters": {"s": "a/b", "t": "c=d"},
        "controls": {},
        "plans": {"p": "e"},
        "profiles": {},
        "config": Path("configs"),
    }
    assert library.loaded == [("m", {"device": "cpu", "dtype": "float32", "stepping": "auto", **files})]
    asked = dict(vars(library.requests[0]))
    image, mask = asked.pop("image"), asked.pop("mask")
    assert (mask.mode, mask.size, mask.getpixel((0, 0))) == ("RGBA", (9, 5), (10, 20, 30, 40))
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (9, 5), (10, 20, 30))
    expected = Request(
        prompt="a ring", negative_prompt="dull", width=24, height=40, num_inference_steps=12, guidance_scale=2.5,
        seed=70, num_images=3, scheduler="euler", strength=0.6, timestep_warp=0.5, class_label=4,
        acceleration=[DeepCache(interval=2), SelectiveGuidance(stop=0.5)],
    )  # fmt: skip
    assert asked == {name: value for name, value in vars(expected).items() if name not in ("image", "mask")}
    assert written(out) == {f"ring.v1-{i}.png": COLOURS[i] for i in range(3)}
    said = ran.stderr.split("\n")
    assert [line.split()[-2:] for line in said if "seed" in line] == [["seed", str(70 + i)] for i in range(3)]
    whole = ran.stderr.replace("\n", "")  # a long path is broken into lines
    assert [whole.count(f"ring.v1-{i}.png") for i in range(3)] == [1] * 3
    assert "12 steps, 34 rows, 2.500 GMACs (75% saved)" in ran.stderr


def test_generate_leaves_the_rest_to_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = Library(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert slipstream("generate", "a ring").exit_code == 0
    options: dict[str, Any] = {
        "device": "auto",
        "dtype": "auto",
        "stepping": "auto",
        "adapters": {},
        "controls": {},
        "plans": {},
        "profiles": {},
        "config": None,
    }
    assert library.loaded == [("shapes-sd", options)]
    assert vars(library.requests[0]) == vars(Request(prompt="a ring", acceleration=[]))
    assert written(tmp_path) == {"image.png": COLOURS[0]}


def test_generate_turns_a_photograph_upright(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library, photograph = Library(monkeypatch), tmp_path / "start.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (9, 5)).save(photograph, exif=exif)
    assert slipstream("generate", "x", "--image", str(photograph), "-o", str(tmp_path / "x.png")).exit_code == 0
    assert library.requests[0].image is not None
    assert library.requests[0].image.size == (5, 9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "24"], "WIDTHxHEIGHT"),
        (["--adapter", "a"], "NAME=PATH"),
        (["--plan", "=a"], "NAME=PATH"),
        (["--image", "/nowhere.png"], "/nowhere.png"),
        (["--image", __file__], "cannot identify"),
        (["--steps", "many"], "--steps"),
    ],
)
def test_what_generate_refuses(arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(monkeypatch)
    ran = slipstream("generate", "a ring", *arguments)
    assert (ran.exit_code, library.requests) == (2, [])
    assert said in ran.stderr


def test_sizes() -> None:
    assert (parse_size("64x48"), parse_size("8X16"), parse_size(None)) == ((64, 48), (8, 16), (None, None))
    for text in ("64", "x48", "64x", "-8x8", "8x8x8", "8 x 8", ""):
        with pytest.raises(typer.BadParameter, match="is not WIDTHxHEIGHT") as caught:
            parse_size(text)
        assert caught.value.param_hint == "--size"


def test_names() -> None:
    assert parse_named(None, "--plan") == {}
    assert parse_named(["a=b", "c=d=e"], "--plan") == {"a": "b", "c": "d=e"}
    for text in ("a", "a=", "=b", ""):
        with pytest.raises(typer.BadParameter, match="is not NAME=PATH") as caught:
            parse_named([text], "--plan")
        assert caught.value.param_hint == "--plan"


def test_macs_of_a_bare_config(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(UNET))
    options = ["--unet-config", str(file), "--steps", "5", "--size", "64x32", "--guidance-scale", "3"]
    cache = ["--acceleration", "deepcache:interval=2", "--acceleration", "selective_guidance:stop=0.5"]
    ran = slipstream("macs", *options, *cache, "--scheduler", "heun", "--json")
    assert ran.exit_code == 0, ran.output
    report = models.macs(
        UNET, acceleration=[DeepCache(interval=2), SelectiveGuidance(stop=0.5)], num_inference_steps=5, width=64,
        height=32, guidance_scale=3.0, scheduler="heun",
    )  # fmt: skip
    assert len(report.steps) == 9
    assert report.image == sum(report.steps) < report.image_unaccelerated == 9 * 2 * report.row
    assert json.loads(ran.stdout) == {
        "parameters": report.parameters,
        "pass": report.row,
        "steps": list(report.steps),
        "step_average": report.image / 9,
        "image": report.image,
        "image_unaccelerated": report.image_unaccelerated,
        "ratio": report.image / report.image_unaccelerated,
    }
    plain = json.loads(slipstream("macs", *options, "--json").stdout)
    assert (plain["ratio"], len(plain["steps"])) == (1.0, 5)
    unguided = json.loads(slipstream("macs", *options[:-1], "1", "--json").stdout)
    assert unguided["image"] * 2 == plain["image"]
    less = json.loads(slipstream("macs", *options, "--no-attention-matmuls", "--json").stdout)
    assert less["pass"] == models.macs(UNET, width=64, height=32, attention_matmuls=False).row < plain["pass"]


def test_the_table_of_macs(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(DIT))
    options = ["--transformer-config", str(file), "--steps", "5"]
    options += ["--acceleration", "delta_dit:interval=2,blocks=2,boundary=0"]
    facts = json.loads(slipstream("macs", *options, "--json").stdout)
    ran = slipstream("macs", *options)
    cells = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in ran.stdout.splitlines() if "│" in line]
    full, reduced = max(facts["steps"]), min(facts["steps"])
    counts = {value: facts["steps"].count(value) for value in (full, reduced)}
    assert cells == [
        ["one row, full pass", f"{facts['pass'] / 1e9:.3f}"],
        [f"a step ({counts[full]} of them)", f"{full / 1e9:.3f}"],
        [f"a step ({counts[reduced]} of them)", f"{reduced / 1e9:.3f}"],
        ["image, unaccelerated", f"{facts['image_unaccelerated'] / 1e9:.3f}"],
        ["image", f"{facts['image'] / 1e9:.3f}"],
        ["ratio", f"{facts['ratio']:.3f}  ({1 / facts['ratio']:.2f}x)"],
    ]
    assert counts == {full: 3, reduced: 2}
    assert f"{facts['parameters'] / 1e6:.1f} M parameters, 5 steps" in ran.stdout


def test_macs_takes_one_source(tmp_path: Path) -> None:
    file, broken, listed = tmp_path / "config.json", tmp_path / "broken.json", tmp_path / "list.json"
    file.write_text(json.dumps(UNET))
    broken.write_text("{")
    listed.write_text("[]")
    for arguments, said in (
        ([], "exactly one"),
        (["--unet-config", str(file), "--transformer-config", str(file)], "exactly one"),
        (["--model", "shapes-sd", "--unet-config", str(file)], "exactly one"),
        (["--unet-config", str(broken)], "broken.json"),
        (["--unet-config", str(listed)], "not a diffusers config"),
        (["--transformer-config", str(tmp_path / "none.json")], "none.json"),
    ):
        ran = slipstream("macs", *arguments)
        assert ran.exit_code == 2
        assert said in ran.stderr


def rows_of(text: str) -> list[list[str]]:
    """The cells of a table whose rows may have several lines."""
    rows: list[list[str]] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("│").split("│")]
        if "│" not in line:
            continue
        if cells[0]:
            rows.append(cells)
        else:
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
    return rows


def test_the_list_of_models() -> None:
    ran = slipstream("models")
    assert [row[:4] for row in rows_of(ran.stdout)] == [
        ["shapes-dit", "PixArtAlphaPipeline", "guidance-2", "D1, D2, D3, D4, D5, D6"],
        ["shapes-edit", "StableDiffusionInstructPix2PixPipeline", "-", "-"],
        ["shapes-sd", "StableDiffusionPipeline", "guidance-2", "-"],
    ]
    for row in rows_of(ran.stdout):
        assert row[4] == (", ".join(sorted(p.stem for p in (BUNDLED / row[0] / "profiles").glob("*.json"))) or "-")
        assert row[5] == json.loads((BUNDLED / row[0] / "slipstream.json").read_text())["description"]
    assert "StableDiffusionXLPipeline" in ran.stdout.splitlines()[-1]


def test_the_list_of_accelerators() -> None:
    rows = {row[0]: row[1:] for row in rows_of(slipstream("accelerators").stdout)}
    nonuniform = "interval = 3 branch = 0 schedule = uniform center = 15 power = 1.5 order = 0"
    assert rows["deepcache"][:2] == ["unet", nonuniform]
    assert rows["deepcache"][3] == "https://arxiv.org/abs/2312.00858"
    assert rows["deepcache"][2].startswith("Between full steps, run only the outer levels of the U-Net")
    assert rows["none"][:2] == ["unet dit", "-"]
    assert rows["cfg_student"][:2] == ["unet dit", "adapter = auto"]
    assert rows["depth_skip"][:2] == ["unet", "depth = required"]
    assert list(rows) == [
        "none", "auto", "deepcache", "delta_dit", "ditfastattn", "cfg_student", "depth_skip", "selective_guidance",
        "forecast",
        "taylorseer", "first_block_cache", "teacache", "magcache", "adaptive_deepcache",
    ]  # fmt: skip
