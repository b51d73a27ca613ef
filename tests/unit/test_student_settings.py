"""What a student's file and its interrupted run say, and what may go on from what; pictures with captions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from models.distill.data import read_pictures
from models.distill.settings import Settings, header, remember, trained_steps
from models.errors import RequestError
from models.fit.loop import Options
from models.shapes.world import SHAPES

SETTINGS = Settings(
    model="hash",
    guidance_scale=3.0,
    rank=4,
    steps=100,
    batch=8,
    learning_rate=0.001,
    relative=True,
    muon=False,
    data="own",
    start_from=["/a"],
    num_inference_steps=25,
    ema_decay=0.5,
    seed=3,
)


def test_what_a_file_says_of_itself() -> None:
    assert SETTINGS.metadata() == {
        "guidance_scale": 3.0,
        "negative_prompt": "",
        "rank": 4,
        "lora_alpha": 4,
        "config_hash": "hash",
        "steps": 100,
        "relative": True,
        "muon": False,
        "num_inference_steps": 25,
        "data": "own",
    }


@pytest.mark.parametrize(
    ("data", "said"), [("trajectories", "trajectories"), ("shapes", "noised"), ("/pictures", "noised")]
)
def test_noised_pictures_have_no_name(data: str, said: str) -> None:
    assert replace(SETTINGS, data=data).metadata()["data"] == said


def student(folder: Path, **changes: Any) -> Path:
    """A file with these settings in its header."""
    said = {name: str(value) for name, value in (SETTINGS.metadata() | changes).items()}
    save_file({"x": torch.zeros(1)}, folder / "student.safetensors", said)
    return folder / "student.safetensors"


def test_a_student_trains_on_under_another_scale_but_has_its_mean_at_its_own(tmp_path: Path) -> None:
    file = student(tmp_path, guidance_scale=2.0, steps=40)
    assert trained_steps(header(file, SETTINGS)) == 40
    assert trained_steps({}) == 0
    with pytest.raises(RequestError, match=r"start_from: .* has guidance_scale 2\.0, not 3\.0"):
        header(file, replace(SETTINGS, steps=0))


@pytest.mark.parametrize("steps", [0, 100])
@pytest.mark.parametrize("change", [{"rank": 8}, {"config_hash": "other"}])
def test_a_student_of_another_model_or_rank_is_refused(change: dict[str, Any], steps: int, tmp_path: Path) -> None:
    [(name, value)] = change.items()
    with pytest.raises(RequestError, match=f"has {name} {value}, not {SETTINGS.metadata()[name]}"):
        header(student(tmp_path, **change), replace(SETTINGS, steps=steps))


CHANGES: dict[str, Any] = {
    "model": "other",
    "guidance_scale": 2.0,
    "rank": 8,
    "batch": 4,
    "learning_rate": 0.01,
    "relative": False,
    "muon": True,
    "start_from": [],
    "num_inference_steps": 10,
    "ema_decay": 0.9,
    "seed": 4,
    "data": "shapes",
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_goes_on_with_its_own_settings_only(name: str, tmp_path: Path) -> None:
    remember(tmp_path / "run", SETTINGS)
    before = (tmp_path / "run" / "settings.json").read_text()
    with pytest.raises(RequestError) as caught:
        remember(tmp_path / "run", replace(SETTINGS, **{name: CHANGES[name]}))
    assert caught.value.field == name
    assert f"{CHANGES[name]} differs from {getattr(SETTINGS, name)} of the run in" in caught.value.reason
    assert (tmp_path / "run" / "settings.json").read_text() == before


@pytest.mark.parametrize(("first", "second"), [("own", "trajectories"), ("trajectories", "own")])
def test_a_run_may_go_on_longer_or_along_the_other_path(first: str, second: str, tmp_path: Path) -> None:
    remember(tmp_path, replace(SETTINGS, data=first))
    remember(tmp_path, replace(SETTINGS, data=second, steps=200))
    saved = json.loads((tmp_path / "settings.json").read_text())
    assert (saved["data"], saved["steps"], saved["seed"]) == (second, 200, 3)


@pytest.mark.parametrize(("first", "second"), [("shapes", "own"), ("/one", "/two")])
def test_noised_pictures_are_fixed(first: str, second: str, tmp_path: Path) -> None:
    remember(tmp_path, replace(SETTINGS, data=first))
    with pytest.raises(RequestError, match="data: "):
        remember(tmp_path, replace(SETTINGS, data=second))


def test_the_learning_rate_warms_up_stays_and_falls() -> None:
    options = Options(folder=Path(), steps=100, warmup=20, decay_share=0.4)
    rates = {step: options.rate(step, options.share_done(step, 0.0)) for step in (0, 9, 19, 50, 60, 80, 100)}
    wanted = {0: 0.05, 9: 0.5, 19: 1.0, 50: 1.0, 60: 1.0, 80: 0.5, 100: 0.0}
    assert rates == pytest.approx(wanted)
    assert Options(folder=Path(), steps=1, minutes=2.0).share_done(7, 30.0) == pytest.approx(0.25)
    assert Options(folder=Path(), steps=10).share_done(11, 0.0) == 1.0


def test_pictures_are_read_with_their_captions(tmp_path: Path) -> None:
    for name, width in (("b.png", 4), ("a.jpg", 5), ("c.webp", 6), ("d.jpeg", 7)):
        Image.new("RGBA" if name == "b.png" else "RGB", (width, 4)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f" {name} \n")
    found = [(picture.width, picture.mode, caption) for picture, caption in read_pictures(tmp_path)]
    names = {5: "a.jpg", 4: "b.png", 6: "c.webp", 7: "d.jpeg"}
    assert found == [(width, "RGB", name) for width, name in names.items()]
    (tmp_path / "c.txt").unlink()
    with pytest.raises(RequestError, match=r"data: .* must hold pictures"):
        read_pictures(tmp_path)


def test_captions_are_repeatable_and_leave_out_what_is_held_out() -> None:
    first, again, other = SHAPES.prompts(1), SHAPES.prompts(1), SHAPES.prompts(2)
    numbers = range(6)
    assert [first(n) for n in numbers] == [again(n) for n in reversed(numbers)][::-1]
    assert [first(n) for n in numbers] != [other(n) for n in numbers]
    pictures = SHAPES.pictures(3, 1)
    assert len(pictures) == 3
    assert [caption for _, caption in pictures] == [caption for _, caption in SHAPES.pictures(3, 1)]
    assert [caption for _, caption in pictures] != [caption for _, caption in SHAPES.pictures(3, 2)]
