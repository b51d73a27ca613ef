"""What the usual pipelines leave at its default: other settings of scheduler, network and VAE, other types and shapes.

Each is loaded by diffusers and by us from one directory; latents and pictures are equal in every bit, in half precision
where schedulers take their own steps.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from PIL import Image
from torch import Tensor

from models import Backbone, Request, generate, load
from models.accelerators import DeepCache, DepthSkip
from models.errors import OutOfRange
from models.networks.unet import UNet
from models.reuse.plans import RowPlan
from models.reuse.rows import Row
from models.reuse.store import FeatureStore
from tests.integration.test_parity import inputs, photo, request, same
from tests.pipelines import LAYOUTS
from tests.plain import denoise
from tests.reference import by_pipeline, generators

Backbones = Callable[..., Backbone]
Pipelines = Callable[..., Any]
Edited = Callable[..., tuple[Backbone, Any]]
FILES = {"scheduler": "scheduler_config.json"}


@pytest.fixture(scope="module")
def edited(pipeline_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Edited:
    """A layout's pipeline with `changes` in the config of one part, loaded by us and by diffusers."""
    root, numbers = tmp_path_factory.mktemp("edited"), count()
    done: dict[str, tuple[Backbone, Any]] = {}

    def loaded(layout: str, part: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Backbone, Any]:
        key = f"{layout} {part} {dtype} {changes}"
        if key not in done:
            done[key] = both(layout, part, dtype, changes)
        return done[key]

    def both(layout: str, part: str, dtype: torch.dtype, changes: dict[str, Any]) -> tuple[Backbone, Any]:
        directory = shutil.copytree(pipeline_dir(layout), root / str(next(numbers)))
        file = directory / part / FILES.get(part, "config.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        pipeline = DiffusionPipeline.from_pretrained(directory, dtype=dtype, local_files_only=True)
        return load(str(directory), device="cpu", dtype=dtype, stepping="exact"), pipeline

    return loaded


@pytest.mark.parametrize("scheduler", ["euler", "euler_ancestral", "heun"])
@pytest.mark.parametrize("layout", ["sd", "pixart-alpha"])
def test_times_between_two_training_steps(layout: str, scheduler: str, edited: Edited) -> None:
    """Spaced evenly from end to end, four times of a thousand are no whole numbers."""
    backbone, pipeline = edited(layout, "scheduler", timestep_spacing="linspace")
    [result] = generate(backbone, [request(layout, True, 1, scheduler=scheduler, num_inference_steps=5)])
    drawn = by_pipeline(pipeline, scheduler, **{**inputs(layout, True, 1), "num_inference_steps": 5})
    assert same(result, drawn)


@pytest.mark.parametrize(("layout", "kind"), [("sd", "v_prediction"), ("sd", "sample"), ("pixart-sigma", "sample")])
def test_what_the_network_predicts(layout: str, kind: str, edited: Edited) -> None:
    backbone, pipeline = edited(layout, "scheduler", prediction_type=kind)
    [result] = generate(backbone, [request(layout, True, 1)])
    assert same(result, by_pipeline(pipeline, "ddim", **inputs(layout, True, 1)))


@pytest.mark.parametrize("layout", ["sd", "sdxl"])
def test_centred_inputs(layout: str, edited: Edited, backbone_of: Backbones) -> None:
    backbone, pipeline = edited(layout, "unet", center_input_sample=True)
    [result], [plain] = (generate(b, [request(layout, True, 1)]) for b in (backbone, backbone_of(layout)))
    assert same(result, by_pipeline(pipeline, "ddim", **inputs(layout, True, 1)))
    assert not torch.equal(result.latents, plain.latents)


@pytest.mark.parametrize(("width", "height"), [(32, 32), (48, 32), (64, 16), (64, 64)])
@pytest.mark.parametrize("layout", ["pixart-alpha", "pixart-sigma"])
def test_positions_drawn_out(layout: str, width: int, height: int, edited: Edited) -> None:
    """An interpolation scale other than 1, at the native size and beside it."""
    backbone, pipeline = edited(layout, "transformer", interpolation_scale=2)
    [result] = generate(backbone, [request(layout, True, 1, width=width, height=height)])
    drawn = by_pipeline(pipeline, "ddim", width=width, height=height, **inputs(layout, True, 1))
    assert same(result, drawn)


MEAN_AND_STD = {"latents_mean": [-1.5, 0.25, 0.5, 2.0], "latents_std": [0.5, 1.25, 2.0, 4.0]}


@pytest.mark.parametrize("layout", ["sd", "sdxl", "pixart-alpha"])
def test_latents_with_a_mean_and_a_deviation(layout: str, edited: Edited) -> None:
    """SDXL's pipelines honour what the VAE says of its latents, the others do not."""
    backbone, pipeline = edited(layout, "vae", scaling_factor=0.3, **MEAN_AND_STD)
    [result] = generate(backbone, [request(layout, True, 1)])
    assert same(result, by_pipeline(pipeline, "ddim", **inputs(layout, True, 1)))


@pytest.mark.parametrize("layout", ["sd", "sdxl"])
def test_pictures_to_latents_with_a_mean_and_a_deviation(layout: str, edited: Edited) -> None:
    backbone, pipeline = edited(layout, "vae", scaling_factor=0.3, **MEAN_AND_STD)
    [result] = generate(backbone, [request(layout, True, 2, image=photo(), strength=0.5)])
    drawn = by_pipeline(pipeline, "ddim", image=photo(), strength=0.5, **inputs(layout, True, 2))
    assert same(result, drawn)


@torch.inference_mode()
def test_a_vae_that_overflows_in_half_precision(edited: Edited) -> None:
    """`force_upcast` decodes and encodes in single precision where the rest is float16, the scaling too."""
    backbone, pipeline = edited("sdxl", "vae", torch.float16, force_upcast=True)
    [result] = generate(backbone, [request("sdxl", True, 1)])
    assert backbone.parts.vae.dtype == torch.float32
    assert result.latents.dtype == torch.float16
    vae = pipeline.vae.to(torch.float32)
    pixels = vae.decode(result.latents.float() / vae.config.scaling_factor).sample
    [expected] = pipeline.image_processor.postprocess(pixels, "pil")
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(expected))
    encoded = backbone.draw(backbone.posterior(photo()), generators(1, 1)[0])
    drawn = vae.encode(pipeline.image_processor.preprocess(photo())).latent_dist.sample(generators(1, 1)[0])
    assert torch.equal(encoded, vae.config.scaling_factor * drawn.half())


@pytest.mark.parametrize(("dtype", "upcast"), [(torch.float16, False), (torch.bfloat16, True)])
def test_other_vaes_stay_in_half_precision(dtype: torch.dtype, upcast: bool, edited: Edited) -> None:
    backbone, pipeline = edited("sd", "vae", dtype, force_upcast=upcast)
    [result] = generate(backbone, [request("sd", True, 1)])
    assert backbone.parts.vae.dtype == dtype
    assert same(result, by_pipeline(pipeline, "ddim", **inputs("sd", True, 1)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16(layout: str, backbone_of: Backbones, pipeline_of: Pipelines) -> None:
    backbone = replace(backbone_of(layout, torch.bfloat16), stepping="exact")
    [result] = generate(backbone, [request(layout, True, 1)])
    assert same(result, by_pipeline(pipeline_of(layout, torch.bfloat16), "ddim", **inputs(layout, True, 1)))


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("layout", ["sdxl", "pixart-sigma"])
def test_starting_noise_that_is_not_square(
    layout: str, images: int, backbone_of: Backbones, pipeline_of: Pipelines
) -> None:
    latents = torch.randn(images, 4, 12, 24, generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"width": 48, "height": 24, "latents": latents}
    [result] = generate(backbone_of(layout), [request(layout, True, images, **options)])
    assert same(result, by_pipeline(pipeline_of(layout), "ddim", **options, **inputs(layout, True, images)))
    with pytest.raises(OutOfRange, match=r"latents: shape .* is not \(\d, 4, 24, 12\)"):
        generate(backbone_of(layout), [request(layout, True, images, width=24, height=48, latents=latents)])


@pytest.mark.parametrize(("width", "height"), [(48, 24), (24, 48)])
@pytest.mark.parametrize("layout", ["sd", "sdxl"])
def test_image_to_image_that_is_not_square(
    layout: str, width: int, height: int, backbone_of: Backbones, pipeline_of: Pipelines
) -> None:
    options: dict[str, Any] = {"image": photo(width, height), "strength": 0.5}
    [result] = generate(backbone_of(layout), [request(layout, True, 1, width=width, height=height, **options)])
    assert result.images[0].size == (width, height)
    assert same(result, by_pipeline(pipeline_of(layout), "ddim", **options, **inputs(layout, True, 1)))


@pytest.mark.parametrize(("width", "height"), [(48, 24), (24, 48)])
def test_pictures_are_brought_to_the_size_asked_for(width: int, height: int, backbone_of: Backbones) -> None:
    """Without keeping their proportions, as diffusers resizes them."""
    smooth = photo(6, 5).resize((60, 50), Image.Resampling.BICUBIC)
    resized = smooth.resize((width, height), Image.Resampling.LANCZOS)
    given, ready = (
        generate(backbone_of("sd"), [request("sd", False, 1, width=width, height=height, image=image)])[0]
        for image in (smooth, resized)
    )
    assert torch.equal(given.latents, ready.latents)
    assert np.array_equal(np.asarray(given.images[0]), np.asarray(ready.images[0]))


@pytest.mark.parametrize("strength", [0.34, 0.99, 1.0])
@pytest.mark.parametrize("scheduler", ["ddim", "heun"])
def test_every_strength(scheduler: str, strength: float, backbone_of: Backbones, pipeline_of: Pipelines) -> None:
    options: dict[str, Any] = {"image": photo(), "strength": strength}
    wanted = request("sd", True, 1, scheduler=scheduler, num_inference_steps=6, **options)
    [result] = generate(backbone_of("sd"), [wanted])
    given = {**inputs("sd", True, 1), "num_inference_steps": 6, **options}
    assert same(result, by_pipeline(pipeline_of("sd"), scheduler, **given))


def remembered_between(full: set[int]) -> Callable[[int], Any]:
    return lambda step: "computed" if step in full else "remembered"


UNEVEN = [(10, 14), (17, 6)]


@pytest.mark.parametrize(("height", "width"), UNEVEN)
@pytest.mark.parametrize("layout", ["sd", "sd2"])
def test_sizes_that_do_not_halve_evenly(
    layout: str, height: int, width: int, backbone_of: Backbones, pipeline_of: Pipelines
) -> None:
    """Which diffusers' pipeline refuses, but not its network."""
    wanted = {"prompt": "a red circle", "negative_prompt": "dull", "width": 2 * width, "height": 2 * height}
    [result] = generate(backbone_of(layout), [request(layout, True, 1, seed=0, guidance_scale=3.0, **wanted)])
    assert torch.equal(result.latents, denoise(pipeline_of(layout), "ddim", steps=4, size=(height, width)))


@pytest.mark.parametrize("level", [0, 3, 8])
@pytest.mark.parametrize(("height", "width"), UNEVEN)
def test_caches_on_sizes_that_do_not_halve_evenly(
    height: int, width: int, level: int, backbone_of: Backbones, pipeline_of: Pipelines
) -> None:
    wanted = {"prompt": "a red circle", "negative_prompt": "dull", "width": 2 * width, "height": 2 * height}
    accelerators = {"remembered": DeepCache(interval=3, branch=level), "zeros": DepthSkip(depth=level + 1)}
    inner: dict[str, Callable[[int], Any]] = {"remembered": remembered_between({0, 3}), "zeros": lambda _: "zeros"}
    for kind, accelerator in accelerators.items():
        options = {"seed": 0, "guidance_scale": 3.0, "acceleration": accelerator, **wanted}
        [result] = generate(backbone_of("sd"), [request("sd", True, 1, **options)])
        expected = denoise(pipeline_of("sd"), "ddim", steps=4, size=(height, width), level=level, inner=inner[kind])
        assert torch.equal(result.latents, expected)


@pytest.mark.parametrize(("layout", "depth"), [("sd", 9), ("sd2", 4)])
def test_depth_skip_is_zeros_in_the_plain_network(
    layout: str, depth: int, backbone_of: Backbones, pipeline_of: Pipelines
) -> None:
    backbone = backbone_of(layout)
    assert backbone.spec.depth == depth
    seen: list[Tensor] = []
    for level in range(depth):
        wanted = Request(
            prompt="a red circle",
            negative_prompt="dull",
            num_inference_steps=2,
            guidance_scale=3.0,
            acceleration=DepthSkip(depth=level + 1),
        )
        [result] = generate(backbone, [wanted])
        zeros = denoise(pipeline_of(layout), "ddim", steps=2, level=level, inner=lambda _: "zeros")
        assert torch.equal(result.latents, zeros)
        assert not any(torch.equal(zeros, other) for other in seen)
        seen.append(zeros)


@pytest.mark.parametrize("centred", [False, True])
def test_the_unconditional_unet_centres_its_input(centred: bool) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    options: dict[str, Any] = {"norm_num_groups": 4, "attention_head_dim": 4, "center_input_sample": centred, **blocks}
    unet = UNet2DModel(sample_size=8, block_out_channels=(8, 16), **options)
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([7])
    ours = UNet(unet).forward(x, t, {}, [Row(RowPlan(), "conditional", None)], FeatureStore())
    with torch.inference_mode():
        assert torch.equal(ours, unet(x, t).sample)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_counted_byte_for_byte(layout: str, backbone_of: Backbones, pipeline_of: Pipelines) -> None:
    parts = [part for part in pipeline_of(layout).components.values() if isinstance(part, torch.nn.Module)]
    expected = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    assert backbone_of(layout).weight_bytes() == expected


@pytest.mark.parametrize("layout", ["sd", "pixart-alpha"])
def test_convolutions_laid_out_channels_last(
    layout: str, pipeline_dir: Callable[[str], Path], backbone_of: Backbones
) -> None:
    """Another order in memory of the network's and the VAE's weights, the same picture."""
    backbone = load(str(pipeline_dir(layout)), device="cpu", dtype="float32")
    backbone.channels_last()
    for part in (backbone.network.module, backbone.parts.vae):
        convolutions = [m for m in part.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size != (1, 1)]
        assert convolutions
        assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)
    [result], [plain] = (generate(b, [request(layout, True, 1)]) for b in (backbone, backbone_of(layout)))
    assert (result.latents - plain.latents).norm() <= 1e-5 * plain.latents.norm()


def test_images_of_one_request_are_drawn_from_seeds_in_a_row(backbone_of: Backbones, pipeline_of: Pipelines) -> None:
    [result] = generate(backbone_of("sd"), [request("sd", False, 3, seed=4, scheduler="euler_ancestral")])
    options = {**inputs("sd", False, 3), "generator": generators(4, 3)}
    assert same(result, by_pipeline(pipeline_of("sd"), "euler_ancestral", **options))
    assert result.seeds == (4, 5, 6)
