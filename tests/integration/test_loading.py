"""What can be loaded, in which types, and what is refused with a reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from app.engine.loading import load_all
from app.engine.pace import Pace
from app.metrics import Metrics
from app.settings import Settings
from models import Backbone, Request, generate, load
from models.accelerators import DeepCache, DepthSkip
from models.errors import ModelLoadError, OutOfRange, WrongBackbone
from tests.integration.test_mixed import distance

Backbones = Callable[..., Backbone]
Directories = Callable[[str], Path]


def request(layout: str, **options: Any) -> Request:
    content = {"class_label": 3} if layout == "dit" else {"prompt": "a red ring"}
    return Request(**{**content, "num_inference_steps": 2, "guidance_scale": 2.0, **options})


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def copied(pipeline_dir: Directories, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a layout's directory to damage."""
    return lambda layout: Path(shutil.copytree(pipeline_dir(layout), tmp_path / layout))


def test_a_directory_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no model_index\.json"):
        load(str(tmp_path))


def test_a_class_that_cannot_be_served(copied: Callable[[str], Path]) -> None:
    directory = copied("sd")
    edit(directory / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(ModelLoadError, match="FluxPipeline is not one of StableDiffusionPipeline"):
        load(str(directory))


def test_an_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="no bundled model, no directory"):
        load("nobody/no-such-model")


@pytest.mark.parametrize(("layout", "part"), [("sd", "unet"), ("dit", "transformer"), ("sd", "vae")])
def test_pickled_weights_are_refused(layout: str, part: str, copied: Callable[[str], Path]) -> None:
    """A .bin file beside a missing .safetensors file is never opened."""
    directory = copied(layout)
    weights = directory / part / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelLoadError, match="safetensors"):
        load(str(directory), device="cpu", dtype="float32")


def test_missing_weights(copied: Callable[[str], Path]) -> None:
    directory = copied("sd")
    (directory / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ModelLoadError):
        load(str(directory), device="cpu", dtype="float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("layout", ["sd", "sdxl", "dit", "pixart-sigma"])
def test_types(layout: str, dtype: str, pipeline_dir: Directories, backbone_of: Backbones) -> None:
    """Half precision stays close to single precision, double closer still; nothing comes out in another type."""
    backbone = load(str(pipeline_dir(layout)), device="cpu", dtype=dtype)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    [result] = generate(backbone, [request(layout, latents=latents)])
    [single] = generate(backbone_of(layout), [request(layout, latents=latents)])
    assert result.latents.dtype == backbone.dtype == getattr(torch, dtype)
    tolerance = {"float16": 0.02, "bfloat16": 0.1, "float64": 1e-4}[dtype]
    assert distance(result.latents.double(), single.latents.double()) <= tolerance


@pytest.mark.parametrize(
    ("layout", "depth"), [("sd", 1), ("sd", 2), ("sd", 4), ("sd", 6), ("sd2", 3), ("sdxl", 3), ("sdxl", 5)]
)
def test_depth_as_a_load_option_equals_depth_skip(
    layout: str, depth: int, pipeline_dir: Directories, backbone_of: Backbones
) -> None:
    """The same picture from a network whose dropped modules never reached memory."""
    small = load(str(pipeline_dir(layout)), device="cpu", dtype="float32", depth=depth)
    whole = backbone_of(layout)
    [short] = generate(small, [request(layout)])
    [skipped] = generate(whole, [request(layout, acceleration=DepthSkip(depth=depth))])
    assert torch.equal(short.latents, skipped.latents)
    assert small.spec.depth == depth
    assert small.weight_bytes() < whole.weight_bytes()
    assert short.usage.macs == skipped.usage.macs


def test_every_depth_loads_fewer_weights(pipeline_dir: Directories, backbone_of: Backbones) -> None:
    sizes = [
        load(str(pipeline_dir("sd")), device="cpu", dtype="float32", depth=depth).weight_bytes()
        for depth in range(1, 10)
    ]
    assert sizes == sorted(sizes)
    assert sizes[-1] < backbone_of("sd").weight_bytes()  # all levels, but no middle


def test_what_a_shallow_network_cannot_do(pipeline_dir: Directories) -> None:
    small = load(str(pipeline_dir("sd")), device="cpu", dtype="float32", depth=3)
    with pytest.raises(OutOfRange, match="branch"):
        generate(small, [request("sd", acceleration=DeepCache(branch=3))])
    with pytest.raises(ModelLoadError, match=r"0 is not in 1\.\.9"):
        load(str(pipeline_dir("sd")), device="cpu", dtype="float32", depth=0)
    with pytest.raises(ModelLoadError, match="only a U-Net"):
        load(str(pipeline_dir("dit")), device="cpu", dtype="float32", depth=2)


def test_without_a_text_encoder(copied: Callable[[str], Path], backbone_of: Backbones) -> None:
    directory = copied("sd")
    shutil.rmtree(directory / "text_encoder")
    shutil.rmtree(directory / "tokenizer")
    edit(directory / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    backbone = load(str(directory), device="cpu", dtype="float32")
    embeds, negative = torch.randn(2, 1, 7, 32)
    given: dict[str, Any] = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    [result] = generate(backbone, [request("sd", **given)])
    [expected] = generate(backbone_of("sd"), [request("sd", **given)])
    assert torch.equal(result.latents, expected.latents)
    with pytest.raises(WrongBackbone, match="without a text encoder"):
        generate(backbone, [request("sd")])
    with pytest.raises(WrongBackbone, match="negative_prompt_embeds: are needed for guidance"):
        generate(backbone, [request("sd", prompt=None, prompt_embeds=embeds)])


def test_extras_beside_a_model(copied: Callable[[str], Path]) -> None:
    """Defaults of the model's own, in slipstream.json."""
    directory = copied("sd")
    extras = {"default_num_inference_steps": 3, "default_guidance_scale": 2.0, "description": "small"}
    (directory / "slipstream.json").write_text(json.dumps(extras))
    spec = load(str(directory), device="cpu", dtype="float32").spec
    assert (spec.default_steps, spec.default_guidance_scale, spec.description) == (3, 2.0, "small")
    assert (spec.native_width, spec.native_height, spec.size_multiple) == (32, 32, 2)


def test_the_default_scheduler_is_the_one_it_came_with(copied: Callable[[str], Path]) -> None:
    directory = copied("sd")
    edit(directory / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    edit(directory / "scheduler" / "scheduler_config.json", _class_name="EulerDiscreteScheduler")
    backbone = load(str(directory), device="cpu", dtype="float32")
    assert backbone.spec.default_scheduler == "euler"
    [default], [euler] = (generate(backbone, [request("sd", scheduler=name)]) for name in (None, "euler"))
    assert torch.equal(default.latents, euler.latents)


@pytest.mark.parametrize(
    ("negative", "complaint"),
    [
        ({"negative_prompt_embeds": torch.zeros(1, 8, 32)}, "negative_prompt_embeds"),
        ({"negative_prompt": "dull"}, "negative_prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 7, 31)}, "prompt_embeds"),
        ({"prompt_embeds": torch.zeros(2, 7, 32)}, "prompt_embeds"),
    ],
)
def test_embeddings_that_fit_no_forward(negative: dict[str, Any], complaint: str, backbone_of: Backbones) -> None:
    """Refused before the first tick, so that they cannot fail the others in it."""
    embeds = {"prompt": None, "prompt_embeds": torch.zeros(1, 7, 32)}
    with pytest.raises(OutOfRange) as caught:
        generate(backbone_of("sd"), [request("sd", **{**embeds, **negative})])
    assert caught.value.field == complaint


def test_a_backbone_does_not_change(backbone_of: Backbones) -> None:
    """Nothing is written onto the network by a run."""
    backbone = backbone_of("sd")
    module = backbone.network.module
    state = {name: dict(vars(child)) for name, child in module.named_modules()}
    weights = [p._version for p in module.parameters()]
    generate(backbone, [request("sd", acceleration=DeepCache(interval=2))])
    assert {name: dict(vars(child)) for name, child in module.named_modules()} == state
    assert [p._version for p in module.parameters()] == weights


def test_a_server_may_load_a_model_in_part_without_its_students() -> None:
    settings = Settings(model=("shapes-sd",), depth=("shapes-sd=3",), device="cpu", max_rows=2)
    backbones, _ = load_all(settings, Metrics(), Pace())
    assert backbones["shapes-sd"].spec.depth == 3
    assert not backbones["shapes-sd"].loras
