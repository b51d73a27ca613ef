"""Without an accelerator `generate` gives diffusers' own latents and pictures, bit for bit, at equal batch shape.

DiTPipeline neither scales its first noise nor passes a generator to the steps, so euler, euler_ancestral, heun and lcm
come out wrong there; for those, and for PixArt from an image (no such pipeline), the reference is a plain loop.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PixArtAlphaPipeline, StableDiffusionPipeline, UNet2DModel
from PIL import Image

from models import Backbone, Request, Result, generate, load
from models.networks.unet import UNet
from models.reuse.plans import RowPlan
from models.reuse.rows import Row
from models.reuse.store import FeatureStore
from models.solvers.names import REGISTRY
from tests.pipelines import LAYOUTS, TEXT_LAYOUTS, UNETS
from tests.reference import Drawn, by_loop, by_pipeline, class_conditioning, generators, text_conditioning

SCHEDULERS = tuple(REGISTRY)
DRIVEN_BY_DIT_PIPELINE = ("ddim", "pndm", "dpmpp_2m", "dpmpp_2m_karras", "unipc")
PROMPT, NEGATIVE = "a red circle", "a blue square"
STEPS, SCALE, SEED = 4, 3.5, 11
ROWS = [pytest.param(True, 2, id="guided-2"), pytest.param(False, 1, id="unguided-1")]

Backbones = Callable[..., Backbone]
Pipelines = Callable[..., Any]


def same(result: Result, drawn: Drawn) -> bool:
    """Equal in every bit of the latents and every pixel."""
    return torch.equal(result.latents, drawn.latents) and all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(result.images, drawn.images, strict=True)
    )


def photo(width: int = 32, height: int = 32) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def inputs(layout: str, guided: bool, images: int, seed: int = SEED) -> dict[str, Any]:
    """What the pipelines call the same request."""
    common = {
        "num_inference_steps": STEPS,
        "guidance_scale": SCALE if guided else 1.0,
        "generator": generators(seed, images),
    }
    if layout == "dit":
        return {**common, "class_labels": [7] * images}
    text = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_images_per_prompt": images}
    pixart = {"use_resolution_binning": False, "clean_caption": False}
    return {**common, **text, **(pixart if layout.startswith("pixart") else {})}


def request(layout: str, guided: bool, images: int, **options: Any) -> Request:
    content = {"class_label": 7} if layout == "dit" else {"prompt": PROMPT, "negative_prompt": NEGATIVE}
    return Request(
        **{
            **content,
            "seed": SEED,
            "num_images": images,
            "num_inference_steps": STEPS,
            "guidance_scale": SCALE if guided else 1.0,
            **options,
        }
    )


@pytest.mark.parametrize(("guided", "images"), ROWS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_to_image(
    layout: str, scheduler: str, guided: bool, images: int, backbone_of: Backbones, pipeline_of: Pipelines
) -> None:
    [result] = generate(backbone_of(layout), [request(layout, guided, images, scheduler=scheduler)])
    pipeline = pipeline_of(layout)
    if layout == "dit" and scheduler not in DRIVEN_BY_DIT_PIPELINE:
        rows = class_conditioning(7, guided)
        drawn = by_loop(pipeline, scheduler, rows, steps=STEPS, scale=SCALE, seeds=generators(SEED, images))
    else:
        drawn = by_pipeline(pipeline, scheduler, **inputs(layout, guided, images))
    assert same(result, drawn)


@pytest.mark.parametrize(("guided", "images"), ROWS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("layout", TEXT_LAYOUTS)
def test_image_to_image(
    layout: str, scheduler: str, guided: bool, images: int, backbone_of: Backbones, pipeline_of: Pipelines
) -> None:
    options: dict[str, Any] = {"scheduler": scheduler, "image": photo(), "strength": 0.6}
    [result] = generate(backbone_of(layout), [request(layout, guided, images, num_inference_steps=5, **options)])
    pipeline = pipeline_of(layout)
    if layout in UNETS:
        options = {**inputs(layout, guided, images), "num_inference_steps": 5, "strength": 0.6}
        drawn = by_pipeline(pipeline, scheduler, image=photo(), **options)
    else:
        seeds = generators(SEED, images)
        drawn = by_loop(
            pipeline,
            scheduler,
            text_conditioning(pipeline, PROMPT, NEGATIVE, guided),
            steps=5,
            scale=SCALE,
            seeds=seeds,
            encoded=encoded(pipeline, photo(), seeds),
            strength=0.6,
        )
    assert same(result, drawn)


@torch.inference_mode()
def encoded(pipeline: Any, image: Image.Image, seeds: list[torch.Generator]) -> torch.Tensor:
    pixels = pipeline.image_processor.preprocess(image)
    latents = [pipeline.vae.encode(pixels).latent_dist.sample(g) for g in seeds]
    return pipeline.vae.config.scaling_factor * torch.cat(latents)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("width", "height"), [(48, 32), (24, 56)])
@pytest.mark.parametrize("layout", TEXT_LAYOUTS)
def test_other_sizes(layout: str, width: int, height: int, backbone_of: Backbones, pipeline_of: Pipelines) -> None:
    [result] = generate(backbone_of(layout), [request(layout, True, 1, width=width, height=height)])
    drawn = by_pipeline(pipeline_of(layout), "ddim", width=width, height=height, **inputs(layout, True, 1))
    assert same(result, drawn)


@pytest.mark.parametrize(("size", "sides"), [((10, 14), 1), ((9, 15), 1), ((17, 13), 2)])
@pytest.mark.parametrize("layout", UNETS)
def test_unets_on_sizes_that_do_not_halve_evenly(
    layout: str, size: tuple[int, int], sides: int, backbone_of: Backbones, pipeline_of: Pipelines
) -> None:
    backbone, unet = backbone_of(layout), pipeline_of(layout).unet
    x, t = torch.randn(sides, 4, *size), torch.full((sides,), 321)
    context = {"encoder_hidden_states": torch.randn(sides, 5, unet.config.cross_attention_dim)}
    added = {"text_embeds": torch.randn(sides, 32), "time_ids": torch.randn(sides, 6)} if layout == "sdxl" else {}
    rows = [Row(RowPlan(), "conditional", i) for i in range(sides)]
    ours = backbone.forward(x, t, {**context, **added}, rows)
    with torch.inference_mode():
        theirs = unet(x, t, **context, added_cond_kwargs=added or None).sample
    assert torch.equal(ours, theirs)


def test_the_unconditional_unet() -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4, **blocks)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([7, 500])
    ours = UNet(unet).forward(x, t, {}, [Row(RowPlan(), "conditional", i) for i in range(2)], FeatureStore())
    with torch.inference_mode():
        assert torch.equal(ours, unet(x, t).sample)


@pytest.mark.parametrize("layout", ["sd", "sdxl", "pixart-alpha"])
def test_without_a_negative_prompt(layout: str, backbone_of: Backbones, pipeline_of: Pipelines) -> None:
    """SDXL puts zeros in its place, the others the empty prompt."""
    [result] = generate(backbone_of(layout), [request(layout, True, 1, negative_prompt=None)])
    absent = "" if layout == "pixart-alpha" else None
    options = {**inputs(layout, True, 1), "negative_prompt": absent}
    assert same(result, by_pipeline(pipeline_of(layout), "ddim", **options))


@pytest.mark.parametrize("layout", TEXT_LAYOUTS)
def test_embeddings_and_starting_noise_in_place_of_text_and_seed(
    layout: str, backbone_of: Backbones, pipeline_of: Pipelines
) -> None:
    torch.manual_seed(5)
    latents = torch.randn(2, 4, 16, 16)
    dim = 64 if layout == "sdxl" else 32
    given: dict[str, Any] = {
        "prompt_embeds": torch.randn(1, 9, dim),
        "negative_prompt_embeds": torch.randn(1, 9, dim),
    }
    if layout == "sdxl":
        given |= {"pooled_prompt_embeds": torch.randn(1, 32), "negative_pooled_prompt_embeds": torch.randn(1, 32)}
    if layout.startswith("pixart"):
        masks = torch.ones(2, 1, 9, dtype=torch.long)
        masks[0, :, 6:] = masks[1, :, 2:] = 0
        given |= {"prompt_attention_mask": masks[0], "negative_prompt_attention_mask": masks[1]}
    texts = {"prompt": None, "negative_prompt": None}
    [result] = generate(backbone_of(layout), [request(layout, True, 2, latents=latents, **given, **texts)])
    options = {**inputs(layout, True, 2), **texts, **given, "latents": latents}
    assert same(result, by_pipeline(pipeline_of(layout), "ddim", **options))


def test_resolution_conditions(pipeline_dir: Callable[[str], Path]) -> None:
    """PixArt-α at 1024 pixels is told the size of the picture."""
    directory = str(pipeline_dir("pixart-alpha-1024"))
    options: dict[str, Any] = {"width": 48, "height": 32}
    [result] = generate(load(directory, device="cpu", dtype="float32"), [request("pixart-alpha", True, 1, **options)])
    pipeline = PixArtAlphaPipeline.from_pretrained(directory)
    assert same(result, by_pipeline(pipeline, "ddim", **options, **inputs("pixart-alpha", True, 1)))


@pytest.mark.parametrize("name", ["ddim", "euler", "euler_ancestral", "dpmpp_2m", "unipc", "lcm"])
def test_zero_terminal_snr(name: str, pipeline_dir: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(pipeline_dir("sd2"), tmp_path / "zero-snr")
    file = directory / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}))
    [result] = generate(load(str(directory), device="cpu", dtype="float32"), [request("sd", True, 1, scheduler=name)])
    pipeline = StableDiffusionPipeline.from_pretrained(directory, safety_checker=None)
    assert same(result, by_pipeline(pipeline, name, **inputs("sd", True, 1)))


def test_two_requests_equal_one_pipeline_call_with_both(backbone_of: Backbones, pipeline_of: Pipelines) -> None:
    torch.manual_seed(6)
    embeds, negatives = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    given = [{"prompt_embeds": embeds[i : i + 1], "negative_prompt_embeds": negatives[i : i + 1]} for i in range(2)]
    texts = {"prompt": None, "negative_prompt": None}
    requests = [request("sd", True, 1, seed=SEED + i, **texts, **given[i]) for i in range(2)]
    results = generate(backbone_of("sd"), requests)
    options = {**inputs("sd", True, 1), **texts, "prompt_embeds": embeds, "negative_prompt_embeds": negatives}
    drawn = by_pipeline(pipeline_of("sd"), "ddim", **{**options, "generator": generators(SEED, 2)})
    assert torch.equal(torch.cat([r.latents for r in results]), drawn.latents)


def test_the_default_scheduler_is_the_pipelines_own(backbone_of: Backbones) -> None:
    explicit, default = (
        generate(backbone_of("sd"), [request("sd", False, 1, scheduler=name)])[0] for name in ("ddim", None)
    )
    assert torch.equal(explicit.latents, default.latents)
