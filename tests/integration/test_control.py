"""Control networks: diffusers' own pipelines bit for bit, as deep as each row goes, beside rows that have none."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import load_file, save_file

from models import Backbone, Request, advance, generate, load
from models.accelerators import AdaptiveDeepCache, CfgStudent, DeepCache, DepthSkip, Forecast, SelectiveGuidance
from models.costs.macs import counts_of
from models.errors import ModelLoadError, RequestError
from models.generate import start
from models.request import Control, LoraScale
from models.resolve import resolve
from models.reuse.plans import RowPlan, StepRows
from tests.pipelines import save_adapter
from tests.reference import generators, scheduler_for
from tests.serving import aio, pixels, serving
from tests.styles import save_style

Backbones = Callable[[str], Backbone]
PIPELINES = {
    "sd": diffusers.StableDiffusionControlNetPipeline,
    "sdxl": diffusers.StableDiffusionXLControlNetPipeline,
}
NAMES = ("canny", "depth")
WIDTH, HEIGHT, STEPS, SCALE, SEED = 40, 24, 5, 3.5, 11


def photo(seed: int = 5, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save_control(unet: Any, folder: Path, seed: int, **options: Any) -> Path:
    """A random control network for a U-Net, as diffusers saves it; nothing left at zero."""
    torch.manual_seed(seed)
    network = ControlNetModel.from_unet(
        unet, **{"conditioning_embedding_out_channels": (8, 16), "load_weights_from_unet": False} | options
    )
    for parameter in network.parameters():
        if parameter.abs().sum() == 0:
            torch.nn.init.normal_(parameter, std=0.2)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def directories(pipeline_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    root, made = tmp_path_factory.mktemp("controls"), dict[str, dict[str, Path]]()

    def of(layout: str) -> dict[str, Path]:
        if layout not in made:
            unet = pipeline_of(layout).unet
            made[layout] = {n: save_control(unet, root / layout / n, 40 + i) for i, n in enumerate(NAMES)}
        return made[layout]

    return of


@pytest.fixture(scope="module")
def steered_of(
    directories: Callable[[str], dict[str, Path]], pipeline_dir: Any, pipeline_of: Any, tmp_path_factory: Any
) -> Backbones:
    loaded: dict[str, Backbone] = {}

    def backbone(layout: str) -> Backbone:
        if layout not in loaded:
            root, pipeline = tmp_path_factory.mktemp("adapters"), pipeline_of(layout)
            student = save_adapter(pipeline.unet, root / "student", guidance_scale=3.0)
            one, two = (save_style(pipeline, root / f"{name}.safetensors", i) for i, name in ((1, "one"), (2, "two")))
            loaded[layout] = load(
                str(pipeline_dir(layout)),
                device="cpu",
                dtype="float32",
                adapters={"student": student, "one": one, "two": two},
                controls=directories(layout),
            )
        return loaded[layout]

    return backbone


def request(**options: Any) -> Request:
    given: dict[str, Any] = {
        "prompt": "a red circle",
        "negative_prompt": "a blue square",
        "num_inference_steps": STEPS,
        "guidance_scale": SCALE,
        "seed": SEED,
        "width": WIDTH,
        "height": HEIGHT,
        "scheduler": "ddim",
        "control": [Control("canny", photo())],
    }
    return Request(**given | options)


RUNS = [
    pytest.param([Control("canny", photo(5), 0.8)], SCALE, 1, "ddim", id="one"),
    pytest.param([Control("canny", photo(5), 1.0, 0.25, 0.8)], 1.0, 2, "euler", id="one-for-a-while-unguided-2"),
    pytest.param(
        [Control("canny", photo(5), 0.8, 0.0, 0.7), Control("depth", photo(6), 0.5, 0.3)],
        SCALE,
        2,
        "dpmpp_2m",
        id="two",
    ),
    pytest.param([Control("depth", photo(7)), Control("canny", photo(8))], SCALE, 1, "heun", id="two-heun"),
]


@pytest.mark.parametrize(("controls", "scale", "images", "scheduler"), RUNS)
@pytest.mark.parametrize("layout", list(PIPELINES))
def test_it_is_diffusers_own(
    layout: str,
    controls: list[Control],
    scale: float,
    images: int,
    scheduler: str,
    steered_of: Backbones,
    directories: Any,
    pipeline_of: Any,
) -> None:
    networks = [ControlNetModel.from_pretrained(directories(layout)[one.name]).eval() for one in controls]
    parts = {**pipeline_of(layout).components}
    if layout == "sd":
        parts["requires_safety_checker"] = False
    many = len(controls) > 1
    called: Any = PIPELINES[layout](**parts, controlnet=networks if many else networks[0])
    called.scheduler = scheduler_for(pipeline_of(layout), scheduler)
    called.set_progress_bar_config(disable=True)

    def given(values: list[Any]) -> Any:
        return values if many else values[0]

    drawn = called(
        prompt="a red circle",
        negative_prompt="a blue square",
        image=given([one.image for one in controls]),
        controlnet_conditioning_scale=given([one.scale for one in controls]),
        control_guidance_start=given([one.start for one in controls]),
        control_guidance_end=given([one.stop for one in controls]),
        num_inference_steps=STEPS,
        guidance_scale=scale,
        generator=generators(SEED, images),
        num_images_per_prompt=images,
        width=WIDTH,
        height=HEIGHT,
        output_type="latent",
    ).images
    backbone = steered_of(layout)
    asked = request(control=controls, guidance_scale=scale, num_images=images, scheduler=scheduler)
    [result] = generate(backbone, [asked])
    assert torch.equal(result.latents, drawn)
    [plain] = generate(backbone, [replace(asked, control=())])
    assert (plain.latents - drawn).abs().max() > 0.05
    [by_table] = generate(replace(backbone, stepping="batched"), [asked])
    assert (by_table.latents - drawn).abs().max() <= 2e-5 * float(drawn.abs().max())


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "none": {"control": ()},
    "two": {"control": [Control("canny", photo(1), 0.7), Control("depth", photo(2), 1.0, 0.0, 0.5)]},
    "other": {"control": [Control("depth", photo(3), 0.4)], "scheduler": "euler"},
    "twice": {"control": [Control("depth", photo(3), 0.4), Control("depth", photo(4))], "guidance_scale": 1.0},
    "deepcache": {"acceleration": DeepCache(interval=2, branch=3), "scheduler": "dpmpp_2m"},
    "uncached": {"acceleration": DeepCache(interval=2, branch=0), "control": ()},
    "depth_skip": {"acceleration": DepthSkip(depth=4), "num_inference_steps": 3},
    "forecast": {"acceleration": Forecast(interval=2, order=1), "num_inference_steps": 7, "scheduler": "unipc"},
    "selective": {"acceleration": [SelectiveGuidance(stop=0.5)], "control": [Control("canny", photo(6), 1.0, 0.4)]},
    "gate": {"acceleration": AdaptiveDeepCache(threshold=0.3), "num_inference_steps": 6},
    "student": {"acceleration": CfgStudent(), "guidance_scale": None, "negative_prompt": None},
    "style": {"loras": [LoraScale("one", 0.8)], "control": ()},
    "other_style": {"loras": [LoraScale("two", 1.2)], "scheduler": "euler"},
    "masked": {"image": photo(9), "mask": Image.new("1", (WIDTH, HEIGHT), 0), "strength": 0.8},
    "masked_alone": {"image": photo(9), "mask": Image.linear_gradient("L").resize((WIDTH, HEIGHT)), "control": ()},
}


@pytest.mark.parametrize("stepping", ["exact", "batched"])
def test_alone_is_mixed(stepping: Any, steered_of: Backbones) -> None:
    """Begun one after another: with none, one or two networks, cached, cut short, gated, masked, styled, a student."""
    backbone = replace(steered_of("sd"), stepping=stepping)
    asked = [request(seed=i, **options) for i, options in enumerate(CASES.values())]
    alone = [generate(backbone, [one])[0] for one in asked]
    runs = [resolve(backbone.spec, backbone.scheduler_config, one) for one in asked]
    begun: list[Any] = []
    while len(begun) < len(runs) or any(not t.done for t in begun):
        if len(begun) < len(runs):
            begun += start(backbone, runs[len(begun)])
        if running := [t for t in begun if not t.done]:
            advance(backbone, running)
    for name, one, trajectory in zip(CASES, alone, begun, strict=True):
        difference = (trajectory.latents - one.latents).abs().max()
        assert difference <= 5e-4 * max(1.0, float(one.latents.abs().max())), name


def test_a_network_goes_as_deep_as_its_row(steered_of: Backbones) -> None:
    backbone = steered_of("sd")
    counts = counts_of(backbone, WIDTH, HEIGHT)
    whole = counts.control("canny", StepRows(RowPlan()))
    assert 0 < whole < counts.row(RowPlan())
    ran: dict[str, int] = {}
    cached = {"plain": {}, "deepcache": {"acceleration": DeepCache(interval=STEPS, branch=0)}}
    for name, options in cached.items():
        [steered], [free] = (generate(backbone, [request(control=c, **options)]) for c in (request().control, ()))
        hints = counts.hint("canny") * 2
        ran[name] = steered.usage.macs - free.usage.macs - hints
        assert steered.usage.macs_unaccelerated - free.usage.macs_unaccelerated == 2 * STEPS * whole + hints
    assert ran["plain"] == 2 * STEPS * whole
    shallow = counts.control("canny", resolve(
        backbone.spec, backbone.scheduler_config, request(**cached["deepcache"])
    ).steps[1])  # fmt: skip
    assert ran["deepcache"] == 2 * whole + (STEPS - 1) * shallow
    assert shallow < 0.2 * whole
    [some] = generate(backbone, [request(control=[Control("canny", photo(), 1.0, 0.0, 0.4)])])
    [none] = generate(backbone, [request(control=())])
    assert some.usage.macs - none.usage.macs == 2 * 2 * whole + counts.hint("canny") * 2


def test_at_full_strength_over_cached_steps_the_remembered_is_of_the_steered(steered_of: Backbones) -> None:
    """A cached step adds the residuals of the levels that it runs anew; the deeper ones are in what it recalls."""
    backbone = steered_of("sd")
    cached = DeepCache(interval=STEPS, branch=2)
    every = request(acceleration=cached)
    first = request(acceleration=cached, control=[Control("canny", photo(), 1.0, 0.0, 0.2)])
    later = request(acceleration=cached, control=[Control("canny", photo(), 1.0, 0.2)])
    latents = [generate(backbone, [one])[0].latents for one in (every, first, later)]
    assert min((a - b).abs().max() for i, a in enumerate(latents) for b in latents[:i]) > 1e-3


def test_what_is_kept_is_counted(steered_of: Backbones) -> None:
    backbone = steered_of("sd")
    run = resolve(backbone.spec, backbone.scheduler_config, request(control=CASES["two"]["control"]))
    [trajectory] = start(backbone, run)
    scale = backbone.spec.latent_scale
    assert run.feature_bytes == trajectory.memory_bytes() == 2 * 16 * (WIDTH // scale) * (HEIGHT // scale) * 4
    assert backbone.control_bytes() == sum(p.nbytes for n in backbone.controls.values() for p in n.module.parameters())


ERRORS = [
    ([Control("edges", photo())], "control.0.name", "'edges' is not one of canny, depth"),
    ([Control("canny", photo(), 5.1)], "control.0.scale", "5.1 is not in 0..5"),
    ([Control("canny", photo()), Control("depth", photo(), float("nan"))], "control.1.scale", "nan"),
    ([Control("canny", photo(), 1.0, -0.1)], "control.0.start", "0..1"),
    ([Control("canny", photo(), 1.0, 0.5, 1.5)], "control.0.stop", "0..1"),
    ([Control("canny", photo(), 1.0, 0.5, 0.5)], "control.0.stop", "0.5 is not above start"),
    ([Control("canny", photo())] * 5, "control", "5 are more than 4"),
    ([{"name": "canny"}], "control", "each is a name and an image"),
    ([{"name": "canny", "image": photo(), "guess_mode": True}], "control", "each is a name and an image"),
]


@pytest.mark.parametrize(("controls", "field", "words"), ERRORS)
def test_requests_that_are_not_possible(controls: Any, field: str, words: str, steered_of: Backbones) -> None:
    backbone = steered_of("sd")
    with pytest.raises(RequestError, match=words) as raised:
        resolve(backbone.spec, backbone.scheduler_config, request(control=controls))
    assert raised.value.field == field


def test_models_without_networks_refuse_them(backbone_of: Any) -> None:
    backbone = backbone_of("sd")
    with pytest.raises(RequestError, match="has no control networks"):
        resolve(backbone.spec, backbone.scheduler_config, request())


def changed(folder: Path, source: Path, **config: Any) -> Path:
    """A copy of a network with another config."""
    folder.mkdir()
    said = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | config))
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(
        (source / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    return folder


BAD = [
    ({"cross_attention_dim": 64}, "cross_attention_dim = 64 where the model has 32: of another base"),
    ({"block_out_channels": [16, 32, 64]}, "of another base"),
    ({"in_channels": 9}, "in_channels = 9 where the model has 4"),
    ({"global_pool_conditions": True}, "global_pool_conditions = True is not implemented"),
    ({"conditioning_channels": 1}, "conditioning_channels = 1 is not implemented"),
    ({"something_new": 3}, "something_new = 3 is not implemented"),
    ({"conditioning_embedding_out_channels": [8, 8, 16]}, "makes a 4th of a picture, and the latents are a 2th"),
    ({"_class_name": "ControlNetUnionModel"}, "is no ControlNetModel"),
]


@pytest.mark.parametrize(("config", "words"), BAD)
def test_networks_of_another_base_are_refused(
    config: dict[str, Any], words: str, directories: Any, pipeline_dir: Any, tmp_path: Path
) -> None:
    bad = changed(tmp_path / "bad", directories("sd")["canny"], **config)
    with pytest.raises(ModelLoadError, match=words):
        load(str(pipeline_dir("sd")), device="cpu", dtype="float32", controls={"bad": bad})


def test_bad_files_are_refused(directories: Any, pipeline_dir: Any, tmp_path: Path) -> None:
    good, sd = directories("sd")["canny"], str(pipeline_dir("sd"))
    broken = changed(tmp_path / "broken", good)
    file = broken / "diffusion_pytorch_model.safetensors"
    weights = {key: weight.clone() for key, weight in load_file(file).items()}  # the file is cut off below
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelLoadError, match="broken"):
        load(sd, device="cpu", dtype="float32", controls={"bad": broken})
    weights["conv_in.bias"][0] = float("nan")
    save_file(weights, file)
    with pytest.raises(ModelLoadError, match=r"conv_in\.bias is not finite"):
        load(sd, device="cpu", dtype="float32", controls={"bad": broken})
    file.rename(broken / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="broken"):
        load(sd, device="cpu", dtype="float32", controls={"bad": broken})
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        load(sd, device="cpu", dtype="float32", controls={"bad": tmp_path / "nowhere"})
    with pytest.raises(ModelLoadError, match="only a U-Net on text is steered"):
        load(str(pipeline_dir("dit")), device="cpu", dtype="float32", controls={"bad": good})


def encoded(picture: Image.Image) -> str:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


@aio
async def test_over_http(steered_of: Backbones, tmp_path: Path) -> None:
    backbone = steered_of("sd")
    steering = {"name": "canny", "image": encoded(photo()), "scale": 0.8, "stop": 0.7}
    asked: dict[str, Any] = {"seed": 3, "width": WIDTH, "height": HEIGHT, "control": [steering]}
    async with serving({"sd": backbone}, data_dir=tmp_path) as served:
        [model] = (await served.client.get("/v1/models")).json()["data"]
        assert [one["name"] for one in model["controls"]] == list(NAMES)
        answer = (await served.post(**asked)).json()
        openai = (await served.post("/v1/images/generations", **asked)).json()
        for bad, field in (
            ([{**steering, "name": "edges"}], "control.0.name"),
            ([{"name": "canny"}], "control.0.image"),
            ([steering, {**steering, "image": "no base64!"}], "control.1.image"),
            ([{**steering, "scale": 9}], "control.0.scale"),
            ([{**steering, "guess_mode": True}], "control.0.guess_mode"),
            ([{**steering, "start": 0.8}], "control.0.stop"),
            ([steering] * 5, "control"),
        ):
            refused = await served.post(**{**asked, "control": bad})
            assert (refused.status_code, refused.json()["error"]["param"]) == (422, field), refused.text
        submitted = {"prompt": "a ring", "num_inference_steps": 3, **asked}
        job = (await served.client.post("/v1/images/jobs", json=submitted)).json()
        assert "image" not in job["request"]["control"][0]
        await served.client.get(f"/v1/images/jobs/{job['id']}/events")
        job = (await served.client.get(f"/v1/images/jobs/{job['id']}")).json()
        assert job["status"] == "completed", job["error"]
        live = (await served.post(**{**asked, "prompt": "a ring"})).json()
        made = Image.open(io.BytesIO((await served.client.get(job["images"][0]["url"])).content))
    expected = generate(backbone, [request(
        prompt="a large red circle on a white background", negative_prompt=None, num_inference_steps=3, seed=3,
        guidance_scale=None, scheduler=None, control=[Control("canny", photo(), 0.8, 0.0, 0.7)],
    )])[0]  # fmt: skip
    assert np.abs(pixels(answer) - np.asarray(expected.images[0]).astype(int)).max() <= 1
    assert openai["data"][0]["b64_json"] == answer["images"][0]["b64_json"]
    assert answer["usage"]["macs"] == expected.usage.macs
    assert np.abs(np.asarray(made).astype(int) - pixels(live)).max() <= 1
    facts = json.loads(Image.open(io.BytesIO(base64.b64decode(answer["images"][0]["b64_json"]))).info["slipstream"])
    [said] = facts["control"]
    assert {"name", "scale", "start", "stop", "image_sha256"} == said.keys()
