"""The single-pass student: it learns, resumes to the same weights, and its file is diffusers' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import PeftAdapterMixin
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from models import Request, generate, load
from models.accelerators import CfgStudent
from models.distill.data import Trajectories
from models.distill.student import Pair
from models.distill.task import DistillTask
from models.errors import RequestError
from models.families.sd import SD
from models.training import distill

PROMPTS = ["a red circle", "a blue star", "a green ring"]
OPTIONS: dict[str, Any] = {
    "guidance_scale": 3.0,
    "rank": 2,
    "steps": 6,
    "batch": 4,
    "learning_rate": 5e-3,
    "prompts": PROMPTS,
    "num_inference_steps": 4,
    "device": "cpu",
}


@pytest.mark.parametrize("layout", ["sd", "sdxl", "pixart-alpha", "pixart-sigma"])
def test_diffusers_reads_the_file_and_draws_the_same(
    layout: str, pipeline_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    file = distill(pipeline_dir(layout), tmp_path, **OPTIONS)
    backbone = load(str(pipeline_dir(layout)), device="cpu", dtype="float32", adapters={"student": file})
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    common: dict[str, Any] = {"num_inference_steps": 3, "latents": noise}
    ours = generate(backbone, [Request(prompt=PROMPTS[0], acceleration=CfgStudent(), **common)])[0].latents
    bare = generate(backbone, [Request(prompt=PROMPTS[0], guidance_scale=1.0, **common)])[0].latents
    theirs = _diffusers(layout, pipeline_dir(layout), tmp_path)(
        PROMPTS[0], guidance_scale=1.0, output_type="latent", height=32, width=32, **common
    ).images
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)  # ours multiplies the low ranks of q, k and v together
    assert (ours - bare).abs().max() > 0.01


def _diffusers(layout: str, directory: Path, adapter: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    if not layout.startswith("pixart"):
        pipeline.load_lora_weights(adapter, weight_name="pytorch_lora_weights.safetensors")
        return pipeline

    class Loading(diffusers.PixArtTransformer2DModel, PeftAdapterMixin):  # type: ignore[misc]
        """diffusers gives its LoRA loader to every transformer but this one."""

    pipeline.transformer.__class__ = Loading
    pipeline.transformer.load_lora_adapter(
        adapter, prefix="transformer", weight_name="pytorch_lora_weights.safetensors"
    )
    options = {"clean_caption": False, "use_resolution_binning": False, "max_sequence_length": 24}
    return lambda *args, **kwargs: pipeline(*args, **kwargs, **options)


def test_the_file_says_what_was_distilled(pipeline_dir: Callable[[str], Path], tmp_path: Path) -> None:
    with safe_open(distill(pipeline_dir("sd"), tmp_path, **OPTIONS), "pt") as file:
        metadata = file.metadata()
    wanted = {"guidance_scale": "3.0", "negative_prompt": "", "rank": "2", "lora_alpha": "2", "steps": "6"}
    assert wanted.items() <= metadata.items()
    assert metadata["config_hash"] == load(str(pipeline_dir("sd")), device="cpu", dtype="float32").spec.config_hash


@pytest.mark.parametrize("layout", ["sd", "pixart-alpha"])
def test_the_student_learns(layout: str, pipeline_dir: Callable[[str], Path]) -> None:
    backbone = load(str(pipeline_dir(layout)), device="cpu", dtype="float32")
    pair = Pair(backbone.family, backbone.network.module, 3.0, 4)
    source = Trajectories(backbone, 4, lambda number: PROMPTS[number % 3], 4)
    task = DistillTask(pair, source, 0.01)
    optimizer, generator = task.optimizers()[0], torch.Generator()
    losses = []
    for _ in range(14):
        losses.append(loss := task.loss(generator))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


@pytest.mark.parametrize("data", ["trajectories", "own", "folder"])
def test_an_interrupted_run_ends_in_the_same_weights(
    data: str, pipeline_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "ema_decay": 0.5, "data": _pictures(tmp_path / "data") if data == "folder" else data}
    whole = load_file(distill(pipeline_dir("sd"), tmp_path / "whole", **options))
    calls, learn = 0, DistillTask.loss

    def interrupted(self: DistillTask, generator: torch.Generator) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return learn(self, generator)

    monkeypatch.setattr(DistillTask, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill(pipeline_dir("sd"), tmp_path / "parts", **options, checkpoint_seconds=0.0)
    parts = load_file(distill(pipeline_dir("sd"), tmp_path / "parts", **options))
    assert calls == 7
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("own", [False, True])
def test_trajectories_follow_the_teacher_or_the_student(own: bool, pipeline_dir: Callable[[str], Path]) -> None:
    backbone = load(str(pipeline_dir("sd")), device="cpu", dtype="float32", adapters={})
    source = Trajectories(backbone, 4, lambda number: PROMPTS[number % 3], 2, own=own)
    before = source.batch(torch.Generator()).x
    guided, student = torch.zeros_like(before), torch.ones_like(before)
    expected = source.scheduler.step(student if own else guided, source.timesteps[0], before).prev_sample
    source.advance(guided, student)
    assert torch.equal(source.batch(torch.Generator()).x, expected)
    assert source.step.tolist() == [1, 1]


def test_a_finished_run_goes_on_its_own_way(pipeline_dir: Callable[[str], Path], tmp_path: Path) -> None:
    first = load_file(distill(pipeline_dir("sd"), tmp_path, **OPTIONS))
    file = distill(pipeline_dir("sd"), tmp_path, **{**OPTIONS, "steps": 8, "data": "own"})
    second = load_file(file)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    with safe_open(file, "pt") as opened:
        assert (opened.metadata()["steps"], opened.metadata()["data"]) == ("8", "own")


@pytest.mark.parametrize("layout", ["sd", "pixart-alpha"])
def test_a_student_is_trained_on_from_its_file(
    layout: str, pipeline_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    first = distill(pipeline_dir(layout), tmp_path / "first", **OPTIONS)
    tiny = {**OPTIONS, "steps": 1, "learning_rate": 1e-9}
    anew = load_file(distill(pipeline_dir(layout), tmp_path / "anew", **tiny))
    file = distill(pipeline_dir(layout), tmp_path / "on", **tiny, start_from=[first])
    before, on = load_file(first), load_file(file)
    assert all(torch.allclose(on[name], before[name], atol=1e-6) for name in before)
    assert any(not torch.allclose(anew[name], before[name], atol=1e-3) for name in before)
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["steps"] == "7"


def test_the_mean_of_students_is_written_without_training(pipeline_dir: Callable[[str], Path], tmp_path: Path) -> None:
    files = [distill(pipeline_dir("sd"), tmp_path / str(s), **OPTIONS, seed=s, relative=True) for s in (1, 2)]
    file = distill(pipeline_dir("sd"), tmp_path / "mean", **{**OPTIONS, "steps": 0}, start_from=files)
    one, two, mean = (load_file(each) for each in (*files, file))
    assert all(torch.allclose(mean[name], (one[name].float() + two[name].float()).half() / 2) for name in one)
    assert any(not torch.equal(one[name], two[name]) for name in one)
    with safe_open(file, "pt") as opened:
        assert (opened.metadata()["steps"], opened.metadata()["relative"]) == ("6", "True")
    assert not (tmp_path / "mean" / "training").exists()
    with pytest.raises(RequestError, match="steps: 0 is for the mean of start_from"):
        distill(pipeline_dir("sd"), tmp_path / "nothing", **{**OPTIONS, "steps": 0})
    with pytest.raises(RequestError, match=r"start_from: .* has guidance_scale 3.0, not 2.0"):
        distill(
            pipeline_dir("sd"), tmp_path / "other", **{**OPTIONS, "steps": 0, "guidance_scale": 2.0}, start_from=files
        )


def test_training_on_needs_the_same_student(pipeline_dir: Callable[[str], Path], tmp_path: Path) -> None:
    first = distill(pipeline_dir("sd"), tmp_path / "first", **{**OPTIONS, "steps": 1})
    with pytest.raises(RequestError, match=r"start_from: .* has rank 2, not 4"):
        distill(pipeline_dir("sd"), tmp_path / "rank", **{**OPTIONS, "rank": 4}, start_from=[first])
    with pytest.raises(RequestError, match=r"start_from: .* has config_hash"):
        distill(pipeline_dir("pixart-alpha"), tmp_path / "model", **OPTIONS, start_from=[first])
    with pytest.raises(RequestError, match=r"start_from: .* is no safetensors file"):
        distill(pipeline_dir("sd"), tmp_path / "none", **OPTIONS, start_from=[tmp_path / "none.safetensors"])


def test_resuming_with_other_settings_is_refused(pipeline_dir: Callable[[str], Path], tmp_path: Path) -> None:
    distill(pipeline_dir("sd"), tmp_path, **{**OPTIONS, "steps": 1})
    with pytest.raises(RequestError, match="rank: 4 differs from 2"):
        distill(pipeline_dir("sd"), tmp_path, **{**OPTIONS, "steps": 1, "rank": 4})
    assert json.loads((tmp_path / "training" / "settings.json").read_text())["rank"] == 2


@pytest.mark.parametrize(
    ("layout", "options", "field"),
    [
        ("dit", {}, "model"),
        ("sd", {"guidance_scale": 1.0}, "guidance_scale"),
        ("sd", {"prompts": []}, "prompts"),
        ("sd", {"data": "."}, "data"),
    ],
)
def test_what_cannot_be_distilled_is_refused(
    layout: str, options: dict[str, Any], field: str, pipeline_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(RequestError) as caught:
        distill(pipeline_dir(layout), tmp_path, **{**OPTIONS, **options})
    assert caught.value.field == field


@pytest.mark.parametrize(("rank", "added"), [(4, 797_184), (64, 12_754_944)])
def test_added_weights_at_the_size_of_stable_diffusion(rank: int, added: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        weights = sum(parameter.numel() for parameter in unet.parameters())
        student = sum(parameter.numel() for parameter in Pair(SD, unet, 7.5, rank).parameters)
    assert weights == 859_520_964
    assert student == added
    assert student / weights <= 0.015


def _pictures(folder: Path) -> Path:
    folder.mkdir()
    for number, prompt in enumerate(PROMPTS):
        Image.new("RGB", (32, 32), (80 * number, 40, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(prompt)
    return folder
