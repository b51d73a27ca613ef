"""Masks: diffusers' own inpainting bit for bit, the original outside of them whatever accelerates, rows that share."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models import Backbone, Request, Result, advance, generate, load
from models.accelerators import (
    AdaptiveDeepCache,
    CfgStudent,
    DeepCache,
    DeltaDiT,
    DepthSkip,
    FirstBlockCache,
    Forecast,
    SelectiveGuidance,
)
from models.errors import RequestError
from models.generate import start
from models.masks import painted, resized
from models.resolve import resolve
from models.trajectory import Trajectory
from tests.pipelines import INPAINT
from tests.reference import Drawn, _recorded, generators, scheduler_for

Backbones = Callable[..., Backbone]
SEED, STEPS, SCALE = 11, 4, 3.5
PIPELINES = {
    "sd": diffusers.StableDiffusionInpaintPipeline,
    "sdxl": diffusers.StableDiffusionXLInpaintPipeline,
    "flux-dev": diffusers.FluxInpaintPipeline,
    "z-image": diffusers.ZImageInpaintPipeline,
}
WIDTH, HEIGHT = 40, 24


def photo(seed: int = 3) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def box(left: int = 5, upper: int = 3, right: int = 27, lower: int = 20) -> Image.Image:
    """Grey levels of a mask: white in a box that ends inside latent pixels."""
    mask = Image.new("L", (WIDTH, HEIGHT), 0)
    mask.paste(255, (left, upper, right, lower))
    return mask


def inside(backbone: Backbone, mask: Image.Image) -> Tensor:
    """Which latent pixels are made anew, [h, w]."""
    scale = backbone.spec.latent_scale
    return torch.from_numpy(np.asarray(mask)[::scale, ::scale] >= 128)


def request(**options: Any) -> Request:
    given: dict[str, Any] = {
        "prompt": "a red circle",
        "negative_prompt": "a blue square",
        "num_inference_steps": STEPS,
        "guidance_scale": SCALE,
        "seed": SEED,
        "width": WIDTH,
        "height": HEIGHT,
        "image": photo(),
        "mask": box(),
        "strength": 0.8,
    }
    return Request(**{name: value for name, value in (given | options).items() if value is not ...})


def by_inpainting(pipeline: Any, scheduler: str | None, images: int = 1, **options: Any) -> Drawn:
    """The same by diffusers' pipeline for masks, over the parts of another."""
    cls = PIPELINES.get(pipeline_name(pipeline), type(pipeline))
    parts = {**pipeline.components}
    if cls is diffusers.StableDiffusionInpaintPipeline:
        parts["requires_safety_checker"] = False
    called = cls(**parts)
    if scheduler is not None:  # set afterwards: the pipeline would change the configuration of some
        called.scheduler = scheduler_for(pipeline, scheduler)
    called.set_progress_bar_config(disable=True)
    steps = _recorded(called.scheduler)
    last: list[Tensor] = []

    def seen(_: Any, __: int, ___: Any, found: dict[str, Tensor]) -> dict[str, Tensor]:
        last.append(found["latents"])
        return found

    inputs: dict[str, Any] = {
        "prompt": "a red circle",
        "negative_prompt": "a blue square",
        "num_inference_steps": STEPS,
        "guidance_scale": SCALE,
        "strength": 0.8,
        "width": WIDTH,
        "height": HEIGHT,
        "num_images_per_prompt": images,
        "image": [photo()] * images,
        "mask_image": [box()] * images,
        "generator": generators(SEED, images),
        "callback_on_step_end": seen,
    }
    inputs |= options
    pictures = called(**{name: value for name, value in inputs.items() if value is not ...}).images
    assert steps
    return Drawn(last[-1], pictures)


def pipeline_name(pipeline: Any) -> str:
    names = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl", "FluxPipeline": "flux-dev"}
    return {**names, "ZImagePipeline": "z-image"}.get(type(pipeline).__name__, "")


def same(result: Result, drawn: Drawn) -> bool:
    return torch.equal(result.latents, drawn.latents) and all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(result.images, drawn.images, strict=True)
    )


# The scheduler, strength, guidance and images of a run.
RUNS = [
    pytest.param("ddim", 0.8, True, 2, id="ddim-guided-2"),
    pytest.param("ddim", 1.0, False, 1, id="ddim-full-unguided"),
    pytest.param("pndm", 0.8, True, 1, id="pndm"),
    pytest.param("euler", 1.0, True, 1, id="euler-full"),
    pytest.param("euler_ancestral", 0.8, True, 1, id="euler_ancestral"),
    pytest.param("dpmpp_2m", 0.8, True, 1, id="dpmpp_2m"),
    pytest.param("heun", 0.8, True, 1, id="heun"),
    pytest.param("unipc", 1.0, True, 1, id="unipc-full"),
    pytest.param("lcm", 0.8, True, 2, id="lcm-2"),
]


@pytest.mark.parametrize(("scheduler", "strength", "guided", "images"), RUNS)
@pytest.mark.parametrize("layout", ["sd", "sdxl", *INPAINT])
def test_inpainting_is_diffusers_own(
    layout: str, scheduler: str, strength: float, guided: bool, images: int, backbone_of: Backbones, pipeline_of: Any
) -> None:
    scale = SCALE if guided else 1.0
    asked = request(scheduler=scheduler, strength=strength, guidance_scale=scale, num_images=images)
    backbone, pipeline = backbone_of(layout), pipeline_of(layout)
    assert backbone.spec.inpaints == (layout in INPAINT)
    [result] = generate(backbone, [asked])
    drawn = by_inpainting(pipeline, scheduler, images, strength=strength, guidance_scale=scale)
    assert same(result, drawn)
    [by_table] = generate(replace(backbone, stepping="batched"), [asked])
    assert (by_table.latents - result.latents).abs().max() <= 1e-5 * max(1.0, float(result.latents.abs().max()))


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("layout", ["flux-dev", "z-image"])
def test_flow_matching_is_diffusers_own(layout: str, strength: float, backbone_of: Backbones, pipeline_of: Any) -> None:
    own: dict[str, Any] = {"flux-dev": {"negative_prompt": ..., "max_sequence_length": 24}}.get(layout, {})
    own |= {"max_sequence_length": 64} if layout == "z-image" else {}
    backbone = backbone_of(layout)
    negative = {"negative_prompt": ...} if layout == "flux-dev" else {}
    asked = request(strength=strength, scheduler="euler", **negative)
    [result] = generate(backbone, [asked])
    drawn = by_inpainting(pipeline_of(layout), None, strength=strength, **own)
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(drawn.images[0]))
    [by_table] = generate(replace(backbone, stepping="batched"), [asked])
    assert (by_table.latents - result.latents).abs().max() <= 1e-5


def clean_latents(backbone: Backbone, asked: Request) -> Tensor:
    """What the picture's latents are drawn to be, [1, channels, h, w]."""
    run = resolve(backbone.spec, backbone.scheduler_config, asked)
    [trajectory] = start(backbone, run)
    assert trajectory.outside is not None
    return trajectory.outside.clean


UNET_RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deepcache": {"acceleration": DeepCache(interval=2), "scheduler": "dpmpp_2m"},
    "depth_skip": {"acceleration": DepthSkip(depth=4), "scheduler": "euler_ancestral"},
    "forecast": {"acceleration": Forecast(interval=2, order=1), "scheduler": "unipc", "num_inference_steps": 8},
    "selective": {"acceleration": [SelectiveGuidance(stop=0.5), Forecast(interval=2)], "num_inference_steps": 7},
    "gate": {"acceleration": AdaptiveDeepCache(threshold=0.4), "num_inference_steps": 6},
    "student": {"acceleration": CfgStudent(), "guidance_scale": ..., "negative_prompt": ..., "scheduler": "heun"},
}
TRANSFORMER_RUNS: dict[str, dict[str, Any]] = {
    "plain": {"scheduler": "ddim"},
    "delta": {"acceleration": DeltaDiT(interval=2, blocks=3), "scheduler": "dpmpp_2m"},
    "forecast": {"acceleration": Forecast(interval=2, order=1), "scheduler": "lcm", "num_inference_steps": 8},
    "gate": {"acceleration": FirstBlockCache(threshold=0.4), "num_inference_steps": 6},
}
CASES = [("sd", name) for name in UNET_RUNS] + [("pixart-alpha", name) for name in TRANSFORMER_RUNS]


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_outside_is_the_original_whatever_accelerates(layout: str, name: str, student_of: Backbones) -> None:
    backbone = student_of(layout)
    options = (UNET_RUNS if layout == "sd" else TRANSFORMER_RUNS)[name]
    asked = request(**options, mask=box(), prompt="a ring")
    clean, made = clean_latents(backbone, asked), inside(backbone, box())
    for stepping in ("exact", "batched"):
        [result] = generate(replace(backbone, stepping=stepping), [asked])
        [unmasked] = generate(replace(backbone, stepping=stepping), [replace(asked, mask=None)])
        assert torch.equal(result.latents[..., ~made], clean[..., ~made])
        assert (unmasked.latents - clean)[..., ~made].abs().max() > 0.1
        assert (result.latents - clean)[..., made].abs().max() > 0.1
        assert result.usage == unmasked.usage


def test_a_trained_model_repaints_inside_alone() -> None:
    """On the bundled model: outside the picture is its round trip to a few levels, inside it is another one."""
    backbone = load("shapes-sd", device="cpu", dtype="float32")
    [drawn] = generate(backbone, [Request(prompt="a large red circle on a white background", seed=4)])
    mask = Image.new("RGBA", (64, 64), "white")
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    asked = Request(
        prompt="a small green square on a white background", seed=5, image=drawn.images[0], mask=mask, strength=1.0
    )
    clean = clean_latents(backbone, asked)
    [result] = generate(backbone, [asked])
    difference = np.abs(np.asarray(result.images[0]).astype(int) - backbone.decode(clean).numpy()[0])
    assert difference[:, 40:].mean() < 2
    assert difference[:, :32].mean() > 10


@pytest.mark.parametrize("stepping", ["exact", "batched"])
@pytest.mark.parametrize("layout", ["sd", "pixart-alpha"])
def test_alone_is_mixed(layout: str, stepping: Any, student_of: Backbones) -> None:
    """Plain rows, rows from a picture, and masked rows with unlike masks and levels, begun one after another."""
    backbone = replace(student_of(layout), stepping=stepping)
    table = UNET_RUNS if layout == "sd" else TRANSFORMER_RUNS
    asked = [request(mask=..., image=..., seed=1), request(mask=..., seed=2, image=photo(5))]
    asked += [request(seed=3 + i, mask=box(2 * i, i), **options) for i, options in enumerate(table.values())]
    asked += [request(seed=20, strength=1.0, mask=Image.new("L", (WIDTH, HEIGHT), 255), num_images=2)]
    alone = [generate(backbone, [one])[0].latents for one in asked]
    runs = [resolve(backbone.spec, backbone.scheduler_config, one) for one in asked]
    begun: list[list[Trajectory]] = []
    while len(begun) < len(runs) or any(not t.done for ts in begun for t in ts):
        if len(begun) < len(runs):
            begun.append(start(backbone, runs[len(begun)]))
        running = [t for ts in begun for t in ts if not t.done]
        if running:
            advance(backbone, running)
    for one, trajectories in zip(alone, begun, strict=True):
        mixed = torch.cat([t.latents for t in trajectories])
        assert (mixed - one).abs().max() <= 2e-4 * max(1.0, float(one.abs().max()))
    assert not torch.equal(alone[2], alone[3])


def test_alone_is_mixed_where_the_network_is_given_masks(backbone_of: Backbones) -> None:
    backbone = backbone_of("sd-inpaint")
    asked = [request(seed=1), request(seed=2, mask=box(10, 10), image=photo(4), strength=1.0, scheduler="euler")]
    asked.append(request(seed=3, acceleration=DeepCache(interval=2), guidance_scale=1.0))
    alone = [generate(backbone, [one])[0].latents for one in asked]
    mixed = [result.latents for result in generate(backbone, asked)]
    for one, other in zip(alone, mixed, strict=True):
        assert (one - other).abs().max() <= 2e-4 * float(one.abs().max())
    assert (alone[0] - generate(backbone, [request(seed=1, mask=box(0, 0, 9, 9))])[0].latents).abs().max() > 1e-3


@pytest.mark.parametrize("layout", ["sd", "sd-inpaint"])
def test_what_a_mask_keeps_is_counted(layout: str, backbone_of: Backbones) -> None:
    backbone = replace(backbone_of(layout), stepping="batched")
    run = resolve(backbone.spec, backbone.scheduler_config, request(num_images=2))
    trajectories = start(backbone, run)
    scale = backbone.spec.latent_scale
    latent = 4 * (HEIGHT // scale) * (WIDTH // scale)
    assert run.feature_bytes == trajectories[0].memory_bytes() == latent * (5 if layout == "sd-inpaint" else 9)
    assert run.request.mask is not None
    assert run.request.mask.size == (WIDTH, HEIGHT)
    plain = resolve(backbone.spec, backbone.scheduler_config, request(acceleration=DeepCache(interval=2)))
    assert plain.feature_bytes > run.feature_bytes
    del trajectories
    gc.collect()


def test_masks_of_every_kind_say_the_same() -> None:
    picture, grey = photo(), box(0, 0, 13, 24)
    clear = photo(8)
    clear.putalpha(grey.point(lambda level: 255 - level))
    shades = clear.convert("LA")
    palette = Image.new("P", (WIDTH, HEIGHT), 1)
    palette.paste(0, (0, 0, 13, 24))
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.info["transparency"] = 0
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    for mask in (grey, clear, shades, palette, grey.convert("1"), deep):
        found = resized(painted(mask, picture), WIDTH, HEIGHT)
        assert np.array_equal(np.asarray(found), np.asarray(grey)), mask.mode
    halved = resized(painted(grey, picture), WIDTH // 2, HEIGHT // 2)
    assert set(np.unique(np.asarray(halved))) == {0, 255}


ERRORS = [
    ({"image": ...}, "mask", "give image too"),
    ({"mask": Image.new("L", (HEIGHT, WIDTH))}, "mask", "24x40 is not the size of the image, 40x24"),
    ({"mask": photo()}, "mask", "it needs transparency, or shades of grey alone"),
    ({"mask": Image.new("CMYK", (WIDTH, HEIGHT))}, "mask", "mode CMYK"),
    ({"strength": 0.1}, "strength", "leaves none to run"),
]


@pytest.mark.parametrize(("options", "field", "words"), ERRORS)
def test_masks_that_are_not_possible(options: dict[str, Any], field: str, words: str, backbone_of: Backbones) -> None:
    backbone = backbone_of("sd")
    with pytest.raises(RequestError, match=words) as raised:
        resolve(backbone.spec, backbone.scheduler_config, request(**options))
    assert raised.value.field == field


def test_models_without_pictures_take_no_mask_and_others_must_have_one(backbone_of: Backbones) -> None:
    dit, filler = backbone_of("dit"), backbone_of("sd-inpaint")
    with pytest.raises(RequestError, match="has no image-to-image"):
        resolve(dit.spec, dit.scheduler_config, Request(class_label=1, mask=box()))
    for missing in ("image", "mask"):
        given = {"image": ..., "mask": ...} if missing == "image" else {"mask": ...}
        with pytest.raises(RequestError, match="was trained to fill in masked parts") as raised:
            resolve(filler.spec, filler.scheduler_config, request(**given))
        assert raised.value.field == missing
