"""A family added as one file and a line, single files, and what happens to pictures on their way in and out."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.commands.generate import generate as generate_command
from app.engine.loading import load_all
from app.engine.pace import Pace
from app.metrics import Metrics
from app.settings import Settings
from models import Backbone, Request, advance, generate, load, macs
from models.accelerators import DeepCache
from models.device import auto_dtype
from models.errors import MixedConditioning, ModelLoadError
from models.families import REGISTRY, Parts
from models.families.sd import StableDiffusion
from models.families.text import UNCONDITIONAL
from models.generate import start
from models.guidance import CONDITIONAL, Scales
from models.request import Run
from models.resolve import resolve
from models.reuse.plans import Role, RowPlan
from models.reuse.rows import Conditioning, Row
from tests.serving import hooked, serving
from tests.single_file import save_single_file

Backbones = Callable[..., Backbone]
Directories = Callable[[str], Path]
PROMPT, NEGATIVE = "a red circle", "a blue square"
IMAGE_SCALE = 1.5


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# A family of three roles, as one file would have it


@dataclass(frozen=True)
class Between:
    """Away from nothing towards the negative prompt, and from that towards the prompt."""

    roles: tuple[Role, ...] = (CONDITIONAL, "between", UNCONDITIONAL)
    above: float = 1.0

    def weights(self, scales: Scales) -> dict[Role, float]:
        s = scales.guidance
        return {CONDITIONAL: s, "between": IMAGE_SCALE - s, UNCONDITIONAL: 1 - IMAGE_SCALE}

    def combine(self, predictions: Mapping[Role, Tensor], scales: Scales) -> Tensor:
        conditional = predictions[CONDITIONAL]
        if len(predictions) == 1:
            return conditional
        between, free = predictions["between"], predictions[UNCONDITIONAL]
        return free + scales.guidance * (conditional - between) + IMAGE_SCALE * (between - free)


class Toy(StableDiffusion):
    """Three rows a guided step, and a class of its own."""

    name = "toy"
    pipelines = ("ToyPipeline",)  # type: ignore[assignment]
    guidance = Between()  # type: ignore[assignment]
    default_guidance_scale = 3.0

    def pipeline(self, class_name: str) -> Any:
        return StableDiffusionPipeline

    def prompts(self, parts: Parts, run: Run) -> list[str]:
        return [*super().prompts(parts, run), ""]

    def conditioning(self, parts: Parts, run: Run) -> dict[Role, Conditioning]:
        rows = super().conditioning(parts, run)
        if run.guided:
            rows["between"] = rows[UNCONDITIONAL]
            rows[UNCONDITIONAL] = self.encode(parts, [""])[0]
        return rows


@pytest.fixture
def toy(pipeline_dir: Directories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    directory = shutil.copytree(pipeline_dir("sd"), tmp_path / "toy")
    edit(directory / "model_index.json", _class_name="ToyPipeline")
    with pytest.raises(ModelLoadError, match="ToyPipeline is not one of"):
        load(str(directory), device="cpu", dtype="float64")
    monkeypatch.setitem(REGISTRY, "ToyPipeline", Toy())
    return load(str(directory), device="cpu", dtype="float64")


def by_hand(backbone: Backbone, seed: int, scale: float, steps: int) -> Tensor:
    """The toy's run with a forward a row and diffusers' own scheduler."""
    texts = {CONDITIONAL: PROMPT, "between": NEGATIVE, UNCONDITIONAL: ""}
    encoded = {role: backbone.family.encode(backbone.parts, [text])[0] for role, text in texts.items()}
    run = resolve(backbone.spec, backbone.scheduler_config, Request(prompt="", num_inference_steps=steps))
    scheduler = run.schedule.fresh()
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for t in run.schedule.timesteps:
        c, p, u = (backbone.forward(x, t[None], row, [Row(RowPlan(), "conditional", 0)]) for row in encoded.values())
        x = scheduler.step(u + scale * (c - p) + IMAGE_SCALE * (p - u), t, x, return_dict=False)[0]
    return x


def test_a_family_of_three_roles_is_a_file_and_a_line(toy: Backbone) -> None:
    assert (toy.spec.layout, toy.spec.family, toy.spec.roles) == (
        "toy",
        "unet",
        (CONDITIONAL, "between", UNCONDITIONAL),
    )
    texts: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": 4}
    requests = [
        Request(seed=3, **texts),
        Request(seed=4, guidance_scale=1.0, **texts),
        Request(seed=5, guidance_scale=5.0, acceleration=DeepCache(interval=2), **texts),
        Request(seed=6, guidance_scale=6.0, **texts),
    ]
    together = generate(toy, requests)
    assert [result.usage.rows for result in together] == [12, 4, 12, 12]
    for result, seed, scale in ((together[0], 3, 3.0), (together[3], 6, 6.0)):
        assert torch.allclose(result.latents, by_hand(toy, seed, scale, 4), rtol=0, atol=1e-10)
    for request, result in zip(requests, together, strict=True):
        [alone] = generate(toy, [request])
        assert torch.allclose(result.latents, alone.latents, rtol=0, atol=1e-10)
    plain, _, cached, _ = (result.usage for result in together)
    assert plain.macs == plain.macs_unaccelerated == cached.macs_unaccelerated
    assert cached.macs < plain.macs
    assert macs(toy, num_inference_steps=4).image == plain.macs


# Conditioning


def test_rows_with_other_conditioning_share_no_forward(backbone_of: Backbones) -> None:
    """A mask that only some have is never dropped, and never given to those without it."""
    backbone = backbone_of("sd")
    run = resolve(backbone.spec, backbone.scheduler_config, Request(prompt=PROMPT, num_inference_steps=2))
    one, other = start(backbone, run)[0], start(backbone, run)[0]
    other.conditioning = {role: {**row, "mask": torch.ones(1, 77)} for role, row in other.conditioning.items()}
    for tick in ([one, other], [other, one]):
        with pytest.raises(MixedConditioning, match="only some rows of this forward are conditioned on mask"):
            advance(backbone, tick)
    assert (one.step, other.step) == (0, 0)


def test_prompts_of_unlike_length_take_turns(backbone_of: Backbones) -> None:
    torch.manual_seed(0)
    backbone = backbone_of("sd", torch.float64)
    embeds: dict[int, Any] = {
        n: {f"{kind}prompt_embeds": torch.randn(1, n, 32) for kind in ("", "negative_")} for n in (5, 9)
    }
    requests: list[Request] = [Request(seed=n, num_inference_steps=3, **embeds[n]) for n in (5, 9)]
    together = generate(backbone, requests)
    for request, result in zip(requests, together, strict=True):
        assert torch.equal(result.latents, generate(backbone, [request])[0].latents)


def test_prompts_are_kept_and_let_go(backbone_of: Backbones) -> None:
    backbone = backbone_of("sd")
    backbone.release()
    assert backbone.prompt_cache_bytes == 0
    request = Request(prompt=PROMPT, negative_prompt=NEGATIVE, num_inference_steps=1)
    [first] = generate(backbone, [request])
    assert backbone.prompt_cache_bytes == 2 * 24 * 32 * 4  # two prompts of 24 tokens
    backbone.release()
    assert backbone.prompt_cache_bytes == 0
    assert torch.equal(generate(backbone, [request])[0].latents, first.latents)


# Pictures


def photo(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_picture_is_resized_when_its_request_is_resolved_and_encoded_once(
    backbone_of: Backbones, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = backbone_of("sd")
    request = Request(prompt=PROMPT, image=photo(50, 70), width=48, height=32, num_images=3, num_inference_steps=2)
    run = resolve(backbone.spec, backbone.scheduler_config, request)
    assert run.request.image is not None
    wanted = VaeImageProcessor(vae_scale_factor=2).preprocess(photo(50, 70), height=32, width=48)
    ours = VaeImageProcessor(do_resize=False).preprocess(run.request.image)
    assert torch.equal(ours, wanted)
    encode, shapes = backbone.parts.vae.encode, list[tuple[int, ...]]()

    def counted(pixels: Tensor) -> Any:
        shapes.append(tuple(pixels.shape))
        return encode(pixels)

    monkeypatch.setattr(backbone.parts.vae, "encode", counted)
    first = [trajectory.latents for trajectory in start(backbone, run)]
    assert shapes == [(1, 3, 32, 48)]
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("layout", ["sd", "sdxl", "dit", "pixart-sigma"])
def test_decoded_bytes_are_those_of_diffusers(layout: str, backbone_of: Backbones) -> None:
    torch.manual_seed(0)
    backbone, latents = backbone_of(layout), 3 * torch.randn(3, 4, 6, 10)
    pixels = backbone.decode(latents)
    assert (tuple(pixels.shape), pixels.dtype) == ((3, 12, 20, 3), torch.uint8)
    with torch.inference_mode():
        decoded = backbone.parts.vae.decode(latents / backbone.parts.vae.config.scaling_factor).sample
    pictures = VaeImageProcessor().postprocess(decoded, output_type="pil")
    off = [np.abs(np.asarray(a, dtype=int) - b.numpy()).max() for a, b in zip(pictures, pixels, strict=True)]
    assert off == [0, 0, 0] if layout != "dit" else max(off) <= 1


def test_whitened_latents_go_through_their_statistics(backbone_of: Backbones, pipeline_dir: Directories) -> None:
    backbone = backbone_of("sdxl")
    config = {**backbone.parts.vae.config, "latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [0.5, 1.0, 2.0, 4.0]}
    config_of = type("Config", (), config)
    latents = torch.randn(2, 4, 3, 5)
    vae = backbone.family.to_vae(latents, config_of)
    mean, std = (torch.tensor(config[f"latents_{name}"]).view(1, 4, 1, 1) for name in ("mean", "std"))
    assert torch.equal(vae, latents * std / config["scaling_factor"] + mean)
    assert torch.allclose(backbone.family.from_vae(vae, config_of), latents, atol=1e-5)


# Loading


def test_an_lcm_unet_is_refused_at_loading(pipeline_dir: Directories, tmp_path: Path) -> None:
    directory = shutil.copytree(pipeline_dir("sd"), tmp_path / "lcm")
    edit(directory / "unet" / "config.json", time_cond_proj_dim=256)
    with pytest.raises(ModelLoadError, match=r"time_cond_proj_dim = 256 is not implemented for sd"):
        load(str(directory), device="cpu", dtype="float32")


def test_a_network_on_other_latents_is_refused(pipeline_dir: Directories, tmp_path: Path) -> None:
    """An inpainting U-Net takes nine channels."""
    directory = shutil.copytree(pipeline_dir("sd"), tmp_path / "inpainting")
    pipeline = StableDiffusionPipeline.from_pretrained(directory)
    unet = pipeline.unet.from_config({**pipeline.unet.config, "in_channels": 10})
    unet.save_pretrained(directory / "unet")
    with pytest.raises(ModelLoadError, match="in_channels = 10 are not the 4 of the VAE's latents"):
        load(str(directory), device="cpu", dtype="float32")


def test_auto_means_the_same_in_the_library_and_in_the_server(
    pipeline_dir: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = str(pipeline_dir("sd"))
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("models.device.fast_bfloat16", lambda device, fast=fast: fast)
        assert auto_dtype(torch.device("cpu")) == dtype
        assert load(directory, device="cpu").dtype == dtype
        served, _ = load_all(Settings(model=(directory,), device="cpu", max_rows=2), Metrics(), Pace())
        assert served["sd"].dtype == dtype


@pytest.fixture(scope="module")
def single(pipeline_of: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small Stable Diffusion pipeline as one file."""
    return save_single_file(pipeline_of("sd"), tmp_path_factory.mktemp("single") / "tiny.v1.safetensors")


@pytest.fixture(scope="module")
def configs(pipeline_dir: Directories, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A layout's directory without its weights."""
    root = tmp_path_factory.mktemp("configs")
    bare = shutil.ignore_patterns("*.safetensors")
    return lambda layout: Path(shutil.copytree(pipeline_dir(layout), root / layout, ignore=bare, dirs_exist_ok=True))


def test_one_safetensors_file(single: Path, configs: Callable[[str], Path], backbone_of: Backbones) -> None:
    backbone = load(str(single), config=configs("sd"), device="cpu", dtype="float32")
    assert (backbone.spec.name, backbone.spec.layout) == ("tiny.v1", "sd")
    request = Request(prompt=PROMPT, negative_prompt=NEGATIVE, seed=3, num_inference_steps=3, width=48, height=32)
    [ours], [directory] = (generate(one, [request]) for one in (backbone, backbone_of("sd")))
    assert torch.equal(ours.latents, directory.latents)
    assert np.array_equal(np.asarray(ours.images[0]), np.asarray(directory.images[0]))


@pytest.mark.parametrize(("given", "complaint"), [("fast", "auto, exact or batched"), ("", "auto, exact or batched")])
def test_a_stepping_that_there_is_not(given: Any, complaint: str, pipeline_dir: Directories) -> None:
    with pytest.raises(ModelLoadError, match=f"stepping: '{given}' is not {complaint}"):
        load(str(pipeline_dir("sd")), stepping=given)


@pytest.mark.parametrize("given", ["float7", "int8", "nn"])
def test_a_dtype_that_there_is_not(given: str, pipeline_dir: Directories) -> None:
    with pytest.raises(ModelLoadError, match=f"dtype: '{given}' is not auto or one of torch's floating-point types"):
        load(str(pipeline_dir("sd")), dtype=given)


class ByWords(StableDiffusion):
    """Prompts of unlike numbers of words keep apart."""

    def group(self, parts: Any, run: Run) -> int:
        """Known from the text alone."""
        return len(str(run.request.prompt).split())


def test_a_family_keeps_prompts_apart_in_the_library_and_in_the_server(backbone_of: Backbones) -> None:
    """The server knows it before anything is encoded: who may not share a forward is in another group."""
    words: list[set[int]] = []

    def look(rows: Sequence[Row]) -> None:
        owners: list[Any] = [row.owner for row in rows]
        words.append({owner.kind for owner in owners})

    backbone = hooked(replace(backbone_of("sd"), family=ByWords()), look)
    prompts = ["a ring", "a red ring", "a star", "a blue star"]
    common: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "width": 32, "height": 32}
    generate(backbone, [Request(prompt=prompt, **common) for prompt in prompts])
    assert words == [{2}, {3}] * 2
    words.clear()

    async def ask() -> list[int]:
        async with serving({"sd": backbone}) as served:
            answers = await asyncio.gather(*(served.post(prompt=prompt, **common) for prompt in prompts))
            return [answer.status_code for answer in answers]

    assert asyncio.run(ask()) == [200] * 4
    assert {number for numbers in words for number in numbers} == {0, 2, 3}  # it warms up without a word
    assert all(len(numbers) == 1 for numbers in words)


def test_one_file_of_sdxl(
    pipeline_of: Callable[..., Any], configs: Callable[[str], Path], backbone_of: Backbones, tmp_path: Path
) -> None:
    file = save_single_file(pipeline_of("sdxl"), tmp_path / "xl.safetensors")
    backbone = load(str(file), config=configs("sdxl"), device="cpu", dtype="float32")
    assert (backbone.spec.name, backbone.spec.layout) == ("xl", "sdxl")
    request = Request(prompt=PROMPT, negative_prompt=NEGATIVE, seed=3, num_inference_steps=3, width=48, height=32)
    [ours], [directory] = (generate(one, [request]) for one in (backbone, backbone_of("sdxl")))
    assert torch.equal(ours.latents, directory.latents)
    assert np.array_equal(np.asarray(ours.images[0]), np.asarray(directory.images[0]))


@pytest.mark.parametrize(
    ("layout", "complaint"),
    [
        ("sd2", "tiny.v1.safetensors with the configs in "),
        ("sdxl", "tiny.v1.safetensors with the configs in "),
        ("pixart-alpha", "diffusers reads no single file of a PixArtAlphaPipeline"),
        ("dit", "diffusers reads no single file of a DiTPipeline"),
    ],
)
def test_a_single_file_with_the_configs_of_another_family(
    layout: str, complaint: str, single: Path, configs: Callable[[str], Path]
) -> None:
    with pytest.raises(ModelLoadError, match=complaint):
        load(str(single), config=configs(layout), device="cpu", dtype="float32")


@pytest.mark.parametrize("part", ["model.diffusion_model", "first_stage_model", "cond_stage_model"])
def test_a_single_file_that_lacks_a_weight(
    part: str, single: Path, configs: Callable[[str], Path], tmp_path: Path
) -> None:
    tensors = load_file(single)
    del tensors[[name for name in tensors if name.startswith(part)][-1]]
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(ModelLoadError, match=r"less\.safetensors"):
        load(str(tmp_path / "less.safetensors"), config=configs("sd"), device="cpu", dtype="float32")


def test_a_single_file_wants_a_config_directory(single: Path, tmp_path: Path, pipeline_dir: Directories) -> None:
    with pytest.raises(ModelLoadError, match="a single file has no configs; give a directory"):
        load(str(single))
    with pytest.raises(ModelLoadError, match=r"no model_index\.json"):
        load(str(single), config=tmp_path)
    with pytest.raises(ModelLoadError, match="no such file"):
        load(str(tmp_path / "gone.safetensors"), config=tmp_path)
    with pytest.raises(ModelLoadError, match=r"a config directory is for a single \.safetensors file"):
        load(str(pipeline_dir("sd")), config=tmp_path)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not a tensor file")
    with pytest.raises(ModelLoadError, match=r"bad\.safetensors"):
        load(str(bad), config=pipeline_dir("sd"))
    with pytest.raises(ModelLoadError, match="cannot be loaded in part"):
        load(str(single), config=pipeline_dir("sd"), depth=2)


def test_a_server_and_the_command_line_take_single_files(
    single: Path, configs: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"config: 'other=x' is not MODEL=DIRECTORY with MODEL one of tiny\.v1"):
        Settings(model=(str(single),), config=("other=x",))
    settings = Settings(model=(str(single),), config=(f"tiny.v1={configs('sd')}",), device="cpu", max_rows=2)
    backbones, _ = load_all(settings, Metrics(), Pace())
    assert backbones["tiny.v1"].spec.layout == "sd"
    file = tmp_path / "drawn.png"
    generate_command(PROMPT, model=str(single), config=configs("sd"), steps=2, device="cpu", output=file)
    with Image.open(file) as picture:
        assert picture.size == (32, 32)
