"""Editing by instruction: three rows a guided step, each bit as diffusers' pipeline draws it, alone or among others."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models import Backbone, Request, Result, generate
from models.accelerators import (
    Accelerator,
    AdaptiveDeepCache,
    DeepCache,
    DepthSkip,
    Forecast,
    SelectiveGuidance,
)
from models.backbone import Stepping
from models.errors import OutOfRange, RequestError, WrongBackbone
from tests.reference import Drawn, by_pipeline, generators
from tests.serving import aio, serving

Backbones = Callable[..., Backbone]
Pipelines = Callable[..., Any]
SCALES = [
    pytest.param(4.0, 1.5, id="guided"),
    pytest.param(4.0, 1.0, id="by-text"),
    pytest.param(1.0, 1.5, id="one-row"),
]
LAYOUT = "instruct-pix2pix"


def photo(seed: int = 3, width: int = 32, height: int = 32) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def edit(**options: Any) -> Request:
    plain = {"prompt": "make the circle blue", "image": photo(), "num_inference_steps": 4, "guidance_scale": 4.0}
    return Request(**{**plain, "image_guidance_scale": 1.5, **options})


def same(result: Result, drawn: Drawn) -> bool:
    return torch.equal(result.latents, drawn.latents) and all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(result.images, drawn.images, strict=True)
    )


def drawn(pipeline: Any, scheduler: str, scales: tuple[float, float], **options: Any) -> Drawn:
    plain = {"prompt": "make the circle blue", "image": photo(), "num_inference_steps": 4}
    both = {"guidance_scale": scales[0], "image_guidance_scale": scales[1], "generator": generators(0, 1)}
    return by_pipeline(pipeline, scheduler, **{**plain, **both, **options})


@pytest.mark.parametrize(("text", "image"), SCALES)
@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler_ancestral", "heun", "unipc"])
def test_as_the_pipeline_edits(
    scheduler: str, text: float, image: float, backbone_of: Backbones, pipeline_of: Pipelines
) -> None:
    asked = edit(scheduler=scheduler, guidance_scale=text, image_guidance_scale=image, negative_prompt="a star")
    [result] = generate(backbone_of(LAYOUT), [asked])
    assert same(result, drawn(pipeline_of(LAYOUT), scheduler, (text, image), negative_prompt="a star"))
    assert result.usage.rows == result.usage.steps * (3 if text > 1 else 1)


def test_several_images_of_another_shape(backbone_of: Backbones, pipeline_of: Pipelines) -> None:
    picture = photo(5, 48, 32)
    asked = edit(image=picture, width=48, height=32, num_images=2, seed=11)
    [result] = generate(backbone_of(LAYOUT), [asked])
    both = {"image": [picture, picture], "prompt": ["make the circle blue"] * 2, "generator": generators(11, 2)}
    pipeline = pipeline_of(LAYOUT)
    components = {**pipeline.components, "scheduler": pipeline.scheduler.from_config(pipeline.scheduler.config)}
    called = type(pipeline)(**components, requires_safety_checker=False)
    called.set_progress_bar_config(disable=True)
    theirs = called(guidance_scale=4.0, image_guidance_scale=1.5, num_inference_steps=4, **both).images
    assert [np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(result.images, theirs, strict=True)] == [
        True,
        True,
    ]
    assert result.images[0].size == (48, 32)


def test_scales_and_defaults_are_diffusers(backbone_of: Backbones, pipeline_of: Pipelines) -> None:
    [result] = generate(backbone_of(LAYOUT), [edit(guidance_scale=None, image_guidance_scale=None)])
    assert same(result, drawn(pipeline_of(LAYOUT), "ddim", (7.5, 1.5)))


@pytest.mark.parametrize(("text", "image"), SCALES)
@pytest.mark.parametrize("scheduler", ["ddim", "euler_ancestral", "dpmpp_2m", "heun"])
def test_tables_edit_alike(
    scheduler: str, text: float, image: float, batched_of: Backbones, pipeline_of: Pipelines
) -> None:
    asked = edit(scheduler=scheduler, guidance_scale=text, image_guidance_scale=image)
    [result] = generate(batched_of(LAYOUT), [asked])
    torch.testing.assert_close(
        result.latents, drawn(pipeline_of(LAYOUT), scheduler, (text, image)).latents, rtol=1e-5, atol=1e-5
    )


ACCELERATED: dict[str, list[Accelerator]] = {
    "plain": [],
    "deepcache": [DeepCache(interval=2, branch=1, order=1)],
    "adaptive": [AdaptiveDeepCache(threshold=0.2, branch=2)],
    "depth_skip": [DepthSkip(depth=4)],
    "forecast": [Forecast(interval=2, order=1, warmup=2)],
    "selective": [SelectiveGuidance(start=0.2, stop=0.6), DeepCache(interval=2, branch=2)],
}


@pytest.mark.parametrize("stepping", ["exact", "batched"])
def test_alone_is_mixed(stepping: Stepping, backbone_of: Backbones) -> None:
    """Rows of three and of one, under every accelerator, other pictures, scales and schedulers, in one forward."""
    backbone = replace(backbone_of(LAYOUT), stepping=stepping)
    requests = [
        edit(acceleration=chosen, image=photo(i), seed=i, image_guidance_scale=1.0 + i / 4, num_inference_steps=6)
        for i, chosen in enumerate(ACCELERATED.values())
    ]
    requests.append(edit(guidance_scale=1.0, seed=9, scheduler="euler_ancestral"))
    alone = [generate(backbone, [asked])[0] for asked in requests]
    mixed = generate(backbone, requests)
    for one, other in zip(alone, mixed, strict=True):
        torch.testing.assert_close(one.latents, other.latents, rtol=1e-4, atol=1e-4)
        assert one.usage == other.usage
    assert not any(torch.allclose(alone[0].latents, other.latents, atol=1e-2) for other in alone[1:])


def test_outside_the_stretch_the_row_that_is_told_and_sees_stands_alone(backbone_of: Backbones) -> None:
    asked = edit(acceleration=SelectiveGuidance(start=0.25, stop=0.5), num_inference_steps=4)
    [result] = generate(backbone_of(LAYOUT), [asked])
    assert result.usage.rows == 1 + 3 + 1 + 1


@pytest.mark.parametrize(
    ("options", "error", "field"),
    [
        pytest.param({"image": None}, RequestError, "image", id="no-image"),
        pytest.param({"strength": 0.5}, WrongBackbone, "strength", id="strength"),
        pytest.param({"mask": Image.new("L", (32, 32))}, WrongBackbone, "mask", id="mask"),
        pytest.param({"image_guidance_scale": 0.9}, OutOfRange, "image_guidance_scale", id="below-1"),
        pytest.param({"image_guidance_scale": float("nan")}, OutOfRange, "image_guidance_scale", id="nan"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[RequestError], field: str, backbone_of: Backbones) -> None:
    with pytest.raises(error) as caught:
        generate(backbone_of(LAYOUT), [edit(**options)])
    assert caught.value.field == field


def test_other_models_have_no_such_scale(backbone_of: Backbones) -> None:
    with pytest.raises(WrongBackbone, match="image_guidance_scale: sd does not take it"):
        generate(backbone_of("sd"), [edit()])


def png(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


@aio
async def test_over_http(backbone_of: Backbones) -> None:
    """By /generate and by OpenAI's form, the library's own picture; what has no meaning is refused by its name."""
    models = {"edit": backbone_of(LAYOUT), "sd": backbone_of("sd")}
    [wanted] = generate(models["edit"], [edit(seed=1, guidance_scale=4.0, image_guidance_scale=1.25)])
    async with serving(models) as served:
        asked: dict[str, Any] = {"prompt": "make the circle blue", "num_inference_steps": 4, "guidance_scale": 4.0}
        asked |= {"image_guidance_scale": 1.25, "seed": 1}
        encoded = base64.b64encode(png(photo())).decode()
        ours = await served.post(image=encoded, **asked)
        assert ours.status_code == 200, ours.text
        data = base64.b64decode(ours.json()["images"][0]["b64_json"])
        with Image.open(io.BytesIO(data)) as shown:
            assert np.array_equal(np.asarray(shown), np.asarray(wanted.images[0]))
            assert '"image_guidance_scale": 1.25' in str(shown.info), shown.info
        assert ours.json()["usage"]["rows"] == 12
        form = {name: str(value) for name, value in asked.items()}
        theirs = await served.client.post("/v1/images/edits", data=form, files={"image": ("a.png", png(photo()))})
        assert theirs.json()["data"][0]["b64_json"] == ours.json()["images"][0]["b64_json"]
        refused: list[tuple[dict[str, Any], str]] = [
            ({}, "image"),
            ({"image": encoded, "strength": 0.5}, "strength"),
            ({"image": encoded, "image_guidance_scale": 0.5}, "image_guidance_scale"),
            ({"image": encoded, "acceleration": {"mode": "auto"}}, "image"),
            ({"model": "sd", "image_guidance_scale": 1.5}, "image_guidance_scale"),
        ]
        for bad, param in refused:
            answer = await served.post(**bad)
            assert (answer.status_code, answer.json()["error"]["param"]) == (422, param), answer.text
        listed = {one["id"]: one for one in (await served.client.get("/v1/models")).json()["data"]}
        assert [(listed[n]["edits"], listed[n]["default_image_guidance_scale"]) for n in models] == [
            (True, 1.5),
            (False, None),
        ]
