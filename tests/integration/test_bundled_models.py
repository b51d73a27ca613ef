"""The bundled models as anybody gets them: plain diffusers loads them and they draw what the captions say."""

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PixArtAlphaPipeline, StableDiffusionPipeline
from safetensors.torch import load_file

import models
from models import Request, generate
from models.accelerators import CfgStudent
from models.shapes import pictures
from models.shapes.checker import check
from models.shapes.shapes import SIDE, parse_caption, render, sample_scenes
from models.shapes.tokenizers import words

BUNDLED = Path(models.__file__).parent / "bundled"
PIPELINES = {"shapes-sd": StableDiffusionPipeline, "shapes-dit": PixArtAlphaPipeline}
RIGHT_OF_EIGHT = {"shapes-sd": 7, "shapes-dit": 7}
EXTRA = {"shapes-sd": {}, "shapes-dit": {"use_resolution_binning": False}}


@pytest.fixture(scope="module", params=PIPELINES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipeline(name: str) -> Any:
    loaded = PIPELINES[name].from_pretrained(BUNDLED / name, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def defaults(name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((BUNDLED / name / "slipstream.json").read_text())
    return read


def _draw(pipeline: Any, name: str, captions: list[str], guidance_scale: float, steps: int) -> list[Any]:
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(captions))]
    drawn: list[Any] = pipeline(
        captions,
        height=SIDE,
        width=SIDE,
        guidance_scale=guidance_scale,
        num_inference_steps=steps,
        generator=generators,
        **EXTRA[name],
    ).images
    return drawn


def test_the_directory_says_which_pipeline_it_is(name: str) -> None:
    assert isinstance(DiffusionPipeline.from_pretrained(BUNDLED / name), PIPELINES[name])


def test_pictures_keep_their_captions(pipeline: Any, name: str, defaults: dict[str, Any]) -> None:
    captions = defaults["examples"]
    drawn = _draw(pipeline, name, captions, defaults["default_guidance_scale"], defaults["default_num_inference_steps"])
    verdicts = [check(picture, caption) for picture, caption in zip(drawn, captions, strict=True)]
    assert all(verdict.background for verdict in verdicts)
    assert sum(verdict.all for verdict in verdicts) >= RIGHT_OF_EIGHT[name]


def test_students_keep_their_captions(name: str, defaults: dict[str, Any]) -> None:
    backbone = models.load(name, device="cpu", dtype="float32")
    added = backbone.adapter_bytes() / sum(p.nbytes for p in backbone.network.module.parameters())
    assert 0 < added <= 0.05
    student = CfgStudent()
    requests = [Request(prompt=text, seed=i, acceleration=student) for i, text in enumerate(defaults["examples"])]
    results = generate(backbone, requests)
    drawn = [(result.images[0], request.prompt or "") for result, request in zip(results, requests, strict=True)]
    assert sum(check(picture, caption).all for picture, caption in drawn) >= RIGHT_OF_EIGHT[name]


@torch.inference_mode()
def test_the_autoencoder_keeps_what_the_checker_reads(pipeline: Any) -> None:
    rng = random.Random(5)
    scenes = list(islice(sample_scenes(5, held_out=True), 128))
    images = pictures.to_tensor(render(scene, rng) for scene in scenes)
    vae = pipeline.vae
    decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in torch.split(images, 32)])
    verdicts = [check(p, s.caption) for p, s in zip(pictures.to_pictures(decoded), scenes, strict=True)]
    assert sum(verdict.all for verdict in verdicts) / len(verdicts) >= 0.97


def test_weights_are_finite_and_in_half_precision(name: str) -> None:
    weights = [weight for path in (BUNDLED / name).rglob("*.safetensors") for weight in load_file(path).values()]
    assert all(weight.dtype == torch.float16 and bool(weight.isfinite().all()) for weight in weights)


def test_activations_are_far_from_the_end_of_half_precision(pipeline: Any, name: str, defaults: dict[str, Any]) -> None:
    largest: list[torch.Tensor] = []

    def note(module: torch.nn.Module, inputs: object, output: object) -> None:
        largest.extend(x.abs().max() for x in (output,) if isinstance(x, torch.Tensor) and x.is_floating_point())

    parts = (pipeline.unet if name == "shapes-sd" else pipeline.transformer, pipeline.vae.decoder)
    hooks = [module.register_forward_hook(note) for part in parts for module in part.modules()]
    try:
        _draw(pipeline, name, defaults["examples"][:2], defaults["default_guidance_scale"], 5)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(largest) > 1000
    assert max(largest) < torch.finfo(torch.float16).max / 64  # about 130 of 65504 when they were made


def test_the_schedule_ends_in_pure_noise(pipeline: Any) -> None:
    config = pipeline.scheduler.config
    assert config.prediction_type == "v_prediction"
    assert config.rescale_betas_zero_snr
    assert config.timestep_spacing == "trailing"
    assert float(pipeline.scheduler.alphas_cumprod[-1]) == 0.0


def test_every_word_of_the_grammar_is_one_token(pipeline: Any) -> None:
    assert [word for word in words() if len(pipeline.tokenizer.tokenize(word)) != 1] == []


def test_the_defaults_are_complete(name: str, defaults: dict[str, Any]) -> None:
    assert defaults["native_width"] == defaults["native_height"] == SIDE
    assert defaults["default_num_inference_steps"] == 25
    assert defaults["default_guidance_scale"] > 1.0
    assert len(defaults["examples"]) == 8
    assert all(parse_caption(caption) for caption in defaults["examples"])
    assert (BUNDLED / name / "README.md").exists()


def test_all_together_take_at_most_50_megabytes() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) <= 50e6


def test_no_pickled_weights() -> None:
    assert [path.name for path in BUNDLED.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")] == []
