"""Training from nothing, in a few steps: every stage runs, an interruption costs nothing, an export goes on."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import models
from models.fit import checkpoint
from models.fit.loop import Options
from models.shapes import train, train_edit
from models.shapes.dataset import Dataset
from models.shapes.denoiser import DenoiserTask
from models.shapes.editor import SCALES, EditTask
from models.shapes.edits import EDIT_WORDS
from models.shapes.networks import widened
from models.shapes.text import Encoded, TextEncoder, with_words

SMALL = ["--batch", "4", "--scenes", "8", "--captions", "2", "--scales", "1", "4"]


def _train(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments), *SMALL])
    train.main()


@pytest.fixture(autouse=True)
def no_previews(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DenoiserTask, "preview", lambda *_: "")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of four steps, and the export of them."""
    folder = tmp_path_factory.mktemp("training")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DenoiserTask, "preview", lambda *_: "")
        _train(patch, "shapes-dit", "--steps", 4, "--folder", folder, "--output", folder / "out")
    return folder


def test_every_stage_from_nothing_to_a_servable_model(trained: Path) -> None:
    model = trained / "out" / "shapes-dit"
    assert models.load(str(model), device="cpu", dtype="float32").spec.depth == 12
    facts = json.loads((model / "training.json").read_text())
    assert (facts["steps"], facts["batch"], facts["scenes"], facts["captions"]) == (4, 4, 8, 2)
    assert "10% make one false claim" in (model / "README.md").read_text()


def test_an_interrupted_run_ends_where_one_in_one_piece_does(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        for name in ("vae", "t5"):
            shutil.copytree(trained / name, folder / name)
        shutil.copy(trained / "latents-8.safetensors", folder)
    file = "shapes-dit.safetensors"
    stage = ("shapes-dit", "--stage", "denoiser", "--steps", 4, "--folder")
    _train(monkeypatch, *stage, whole)

    class Interruption(Exception):
        pass

    def save_and_fail(path: Path, *given: Any) -> None:
        save(path, *given)
        if given[-1]["step"] == 2:
            raise Interruption

    save = checkpoint.save
    with monkeypatch.context() as patch:
        patch.setattr("models.shapes.train.Options", partial(Options, checkpoint_seconds=0.0))
        patch.setattr(checkpoint, "save", save_and_fail)
        with pytest.raises(Interruption):
            _train(patch, *stage, parts)
    _train(monkeypatch, *stage, parts)
    one, other = (load_file(folder / file) for folder in (whole, parts))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_export_is_trained_on(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = trained / "out" / "shapes-dit"
    _train(
        monkeypatch,
        *("shapes-dit", "--stage", "denoiser", "--steps", 6),
        *("--folder", tmp_path, "--start-from", start),
    )
    state = checkpoint.read_state(tmp_path / "shapes-dit.safetensors")
    assert state["step"] == 6
    assert json.loads((tmp_path / "shapes-dit-before.json").read_text())["steps"] == 4
    assert state["seconds"] > 60 * json.loads((start / "training.json").read_text())["minutes"]


def test_the_card_says_what_every_part_of_the_training_saw(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = trained / "out" / "shapes-dit"
    for steps in (6, 8):
        folders = ("--folder", tmp_path / str(steps), "--output", tmp_path / str(steps))
        for stage in ("denoiser", "validate", "export"):
            _train(monkeypatch, "shapes-dit", "--stage", stage, "--steps", steps, *folders, "--start-from", start)
        start = tmp_path / str(steps) / "shapes-dit"
    card = (start / "README.md").read_text()
    assert "This one: 8 steps of 4 captions" in card
    assert "Until step 4 it saw 8 scenes, 10% of their captions false.\nUntil step 6 it saw 8 scenes" in card


def test_some_captions_are_empty_and_some_are_false() -> None:
    count = 100
    captions = Encoded(torch.arange(2 * count + 1).view(-1, 1, 1), torch.ones(2 * count + 1, 1))
    latents = torch.arange(count).view(-1, 1, 1, 1).half()
    clean, told = Dataset(latents, captions).batch(10_000, 0.2, 0.3, torch.Generator().manual_seed(0))
    scene, caption = clean.flatten().long(), told.tokens.flatten().long()
    true, false, empty = caption == scene, caption == scene + count, caption == 2 * count
    assert bool((true | false | empty).all())
    assert float(empty.float().mean()) == pytest.approx(0.2, abs=0.02)
    assert float(false.float().mean()) == pytest.approx(0.3, abs=0.02)


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shapes-sd trained to edit for two steps, and the export of that."""
    folder = tmp_path_factory.mktemp("editing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EditTask, "preview", lambda *_: "")
        patch.setattr("models.shapes.editor.STEPS", 2)
        _train(patch, "shapes-edit", "--steps", 2, "--folder", folder, "--output", folder / "out")
    return folder


def test_shapes_sd_becomes_an_editor(edited: Path) -> None:
    """What it could is not lost: a picture of weight zero, words that are added."""
    model = edited / "out" / "shapes-edit"
    spec = models.load(str(model), device="cpu", dtype="float32").spec
    assert (spec.layout, spec.edits, spec.default_image_guidance_scale) == ("instruct_pix2pix", True, SCALES[1])
    facts = json.loads((model / "training.json").read_text())
    assert (facts["steps"], facts["batch"], facts["scenes"], facts["edits"]) == (2, 4, 8, 2)
    assert "This one: 2 steps of 4 edits, of 8 scenes" in (model / "README.md").read_text()
    start = widened(train_edit.START / "unet")
    old = load_file(train_edit.START / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].float()
    assert torch.equal(start.conv_in.weight[:, :4], old)
    assert not start.conv_in.weight[:, 4:].any()


def test_old_words_stay_as_they_were() -> None:
    start = train_edit.START / "text_encoder"
    old, new = TextEncoder("clip", start), with_words(start, EDIT_WORDS)
    captions = ["a large red circle above a small blue square on a white background", ""]
    with torch.inference_mode():
        before, after = (encoder.eval().float()(captions).tokens for encoder in (old, new))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_an_editor_is_trained_on(edited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EditTask, "preview", lambda *_: "")
    start = edited / "out" / "shapes-edit"
    shutil.copy(edited / "edits-8.safetensors", tmp_path)
    given = ("--stage", "denoiser", "--steps", 3, "--folder", tmp_path, "--start-from", start)
    _train(monkeypatch, "shapes-edit", *given)
    assert checkpoint.read_state(tmp_path / "shapes-edit.safetensors")["step"] == 3
