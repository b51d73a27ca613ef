"""Transformers over text and image tokens: diffusers' own pipelines bit for bit, and what one forward mixes."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, StableDiffusion3Img2ImgPipeline, ZImageImg2ImgPipeline
from PIL import Image
from torch import Tensor

from models import Backbone, Request, Result, advance, generate, load
from models.accelerators import CfgStudent, DeltaDiT, Forecast, SelectiveGuidance
from models.errors import GuidanceRequired, ModelLoadError, OutOfRange, RequestError, StudentConflict, WrongBackbone
from models.generate import start
from models.resolve import plain_rows, resolve
from models.solvers.flow import FLOW_REGISTRY
from tests.pipelines import JOINT
from tests.reference import generators

Backbones = Callable[..., Backbone]
Pipelines = Callable[..., Any]
PROMPT, NEGATIVE = "a large red circle", "a blue square on a white background"
Pack = Callable[[Tensor], Tensor]


def patches(latents: Tensor) -> Tensor:
    """Latents as a pipeline packs them: four pixels a token."""
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, 4 * c)


def flat(latents: Tensor) -> Tensor:
    """Latents as a pipeline packs them whose pixels are tokens."""
    return latents.flatten(2).transpose(1, 2)


def unpacked(latents: Tensor) -> Tensor:
    """Latents as a pipeline has them that packs none."""
    return latents


@dataclass(frozen=True)
class Case:
    """What a layout's pipeline calls what we call the same: inputs of a plain run, and of a guided one."""

    plain: dict[str, Any] = field(default_factory=dict)
    guided: dict[str, Any] = field(default_factory=dict)
    exact: bool = False  # whether its guided rows share a forward, so that ours are bitwise the same
    from_image: Any = None
    pack: Pack = unpacked
    options: dict[str, Any] = field(default_factory=dict)  # of its call alone
    unguided: dict[str, Any] = field(default_factory=dict)  # what a guided run is without its guidance


BY_NEGATIVE = {"true_cfg_scale": 2.5, "negative_prompt": NEGATIVE}
CASES = {
    "flux-dev": Case(
        {"guidance_scale": 3.0},
        {"guidance_scale": 2.0, **BY_NEGATIVE},
        from_image=FluxImg2ImgPipeline,
        pack=patches,
        options={"max_sequence_length": 24},
        unguided={"true_cfg_scale": 1.0},
    ),
    "flux-schnell": Case(
        {},
        BY_NEGATIVE,
        from_image=FluxImg2ImgPipeline,
        pack=patches,
        options={"max_sequence_length": 24},
        unguided={"true_cfg_scale": 1.0},
    ),
    **{
        layout: Case(
            {"guidance_scale": 1.0},
            {"guidance_scale": 3.0, "negative_prompt": NEGATIVE},
            exact=True,
            from_image=StableDiffusion3Img2ImgPipeline,
            options={"max_sequence_length": 24},
            unguided={"guidance_scale": 1.0},
        )
        for layout in ("sd3", "sd3.5")
    },
    "klein-base": Case(
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0},  # away from the empty prompt
        pack=flat,
        options={"max_sequence_length": 24},
        unguided={"guidance_scale": 1.0},
    ),
    "klein": Case({"guidance_scale": 1.0}, pack=flat, options={"max_sequence_length": 24}),
    "z-image": Case(
        {"guidance_scale": 0.0},
        {"guidance_scale": 2.0, "negative_prompt": NEGATIVE},
        exact=True,
        from_image=ZImageImg2ImgPipeline,
        options={"max_sequence_length": 64},
        unguided={"guidance_scale": 0.0},
    ),
}
SIZES = [(32, 32), (24, 40)]


def test_every_layout_is_tried() -> None:
    assert tuple(CASES) == JOINT


def drawn(pipeline: Any, case: Case, scheduler: str = "euler", **inputs: Any) -> tuple[Tensor, list[Image.Image]]:
    """Final latents as the pipeline has them, and pictures, of its own call."""
    cls, options = FLOW_REGISTRY[scheduler]
    known = {k: v for k, v in pipeline.scheduler.config.items() if scheduler == "euler" or k != "shift"}
    components = {**pipeline.components, "scheduler": cls.from_config(known, **options)}  # type: ignore[attr-defined]
    called = (case.from_image if "image" in inputs else type(pipeline))(**components)
    called.set_progress_bar_config(disable=True)
    plain, last = called.scheduler.step, []

    @functools.wraps(plain)
    def step(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        last.append(result[0])
        return result

    called.scheduler.step = step
    images = called(prompt=PROMPT, **{**case.options, **inputs}).images
    return last[-1], images


def same(case: Case, result: Result, latents: Tensor, images: list[Image.Image]) -> bool:
    """Equal in every bit of the latents and every pixel."""
    pictures = zip(result.images, images, strict=True)
    alike = all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pictures)
    return alike and torch.equal(case.pack(result.latents), latents)


def near(case: Case, result: Result, latents: Tensor, tolerance: float = 1e-5) -> bool:
    return float((case.pack(result.latents) - latents).abs().max()) <= tolerance * float(latents.abs().max())


def photo(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("layout", CASES)
def test_text_to_image(
    layout: str, width: int, height: int, images: int, backbone_of: Backbones, pipeline_of: Pipelines
) -> None:
    case = CASES[layout]
    common = {"width": width, "height": height, "num_inference_steps": 4, **case.plain}
    [result] = generate(backbone_of(layout), [Request(prompt=PROMPT, seed=5, num_images=images, **common)])
    theirs = drawn(pipeline_of(layout), case, generator=generators(5, images), num_images_per_prompt=images, **common)
    assert same(case, result, *theirs)


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("layout", [layout for layout, case in CASES.items() if case.guided])
def test_guided(layout: str, width: int, height: int, backbone_of: Backbones, pipeline_of: Pipelines) -> None:
    case = CASES[layout]
    common = {"width": width, "height": height, "num_inference_steps": 3, **case.guided}
    [result] = generate(backbone_of(layout), [Request(prompt=PROMPT, seed=6, **common)])
    assert result.usage.rows == 6
    theirs = drawn(pipeline_of(layout), case, generator=generators(6, 1), **common)
    assert same(case, result, *theirs) if case.exact else near(case, result, theirs[0])
    [plain] = generate(backbone_of(layout), [Request(prompt=PROMPT, seed=6, **{**common, **case.unguided})])
    assert not near(case, plain, theirs[0], 1e-2)


@pytest.mark.parametrize(("width", "height", "strength"), [(40, 24, 0.5), (32, 32, 0.8)])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("layout", [layout for layout, case in CASES.items() if case.from_image])
def test_image_to_image(
    layout: str,
    guided: bool,
    width: int,
    height: int,
    strength: float,
    backbone_of: Backbones,
    pipeline_of: Pipelines,
) -> None:
    case = CASES[layout]
    settings = case.guided if guided else case.plain
    common = {"width": width, "height": height, "num_inference_steps": 5, "strength": strength, **settings}
    common["image"] = photo(width, height)
    [result] = generate(backbone_of(layout), [Request(prompt=PROMPT, seed=7, **common)])
    theirs = drawn(pipeline_of(layout), case, generator=generators(7, 1), **common)
    assert same(case, result, *theirs) if case.exact or not guided else near(case, result, theirs[0])


@pytest.mark.parametrize("scheduler", [name for name in FLOW_REGISTRY if name != "euler"])
def test_other_schedulers(scheduler: str, backbone_of: Backbones, pipeline_of: Pipelines) -> None:
    case = CASES["flux-dev"]
    common = {"width": 32, "height": 48, "num_inference_steps": 5, **case.plain}
    [result] = generate(backbone_of("flux-dev"), [Request(prompt=PROMPT, seed=8, scheduler=scheduler, **common)])
    assert same(case, result, *drawn(pipeline_of("flux-dev"), case, scheduler, generator=generators(8, 1), **common))


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("scheduler", FLOW_REGISTRY)
@pytest.mark.parametrize("layout", CASES)
def test_batched_stepping(
    layout: str, scheduler: str, image: bool, backbone_of: Backbones, batched_of: Backbones
) -> None:
    case = CASES[layout]
    if image and case.from_image is None:
        pytest.skip("no image-to-image")
    start_from = {"image": photo(32, 32), "strength": 0.7} if image else {}
    request = Request(
        prompt=PROMPT,
        seed=9,
        scheduler=scheduler,
        num_inference_steps=6,
        **case.guided,
        **start_from,  # type: ignore[arg-type]
    )
    exact, batched = (generate(one(layout), [request])[0].latents for one in (backbone_of, batched_of))
    assert float((exact - batched).abs().max()) <= 1e-5 * float(exact.abs().max())


# Text encoders


@pytest.mark.parametrize("layout", ["flux-dev", "sd3", "klein-base", "z-image"])
def test_prompts_encoded_together_are_those_encoded_alone(layout: str, backbone_of: Backbones) -> None:
    backbone = backbone_of(layout)
    texts = [f"a{' large' * i} red ring {i}" for i in range(4)]
    case = CASES[layout]
    runs = [resolve(backbone.spec, backbone.scheduler_config, Request(prompt=t, **case.guided)) for t in texts]
    backbone.parts.prompts.release()
    alone = [backbone.conditioning(run) for run in runs]
    backbone.parts.prompts.release()
    backbone.prepare(runs)
    for one, run in zip(alone, runs, strict=True):
        together = backbone.conditioning(run)
        assert one.keys() == together.keys()
        for role, tensors in one.items():
            for name, tensor in tensors.items():
                assert torch.allclose(tensor.double(), together[role][name].double(), rtol=1e-5, atol=1e-5)
    other = alone[0]["conditional"]
    assert any(not torch.equal(t, alone[1]["conditional"][name]) for name, t in other.items())


def test_text_encoders_that_are_on_the_device_only_while_they_encode(
    pipeline_dir: Callable[[str], Path], backbone_of: Backbones, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = str(pipeline_dir("sd3"))
    backbone = load(directory, device="cpu", dtype="float32", offload_text_encoders=True)
    assert backbone.encoder_bytes() == 0
    assert backbone.weight_bytes() == backbone_of("sd3").weight_bytes() - backbone_of("sd3").encoder_bytes()
    moves: list[tuple[str, object]] = []
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        encoder = getattr(backbone.parts.pipeline, name)
        monkeypatch.setattr(encoder, "to", lambda place, name=name: moves.append((name, place)))
    request = Request(prompt=PROMPT, seed=3, num_inference_steps=2)
    [ours], [plain] = (generate(one, [request]) for one in (backbone, backbone_of("sd3")))
    assert torch.equal(ours.latents, plain.latents)
    names = ["text_encoder", "text_encoder_2", "text_encoder_3"]
    once = [(name, place) for place in (torch.device("cpu"), "cpu") for name in names]
    assert moves == once * 2  # the prompt and the empty negative one
    generate(backbone, [request])
    assert moves == once * 2  # known prompts need no encoder


# What does not fit


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"scheduler": "ddim"}, WrongBackbone, "is not for flow matching; one of euler, dpmpp_2m, unipc"),
        ({"scheduler": "nosuch"}, WrongBackbone, "is not known"),
        ({"timestep_warp": 2.0}, RequestError, "flow matching takes no custom time steps"),
        ({"true_cfg_scale": 2.0}, GuidanceRequired, "negative_prompt: is needed with true_cfg_scale"),
        ({"true_cfg_scale": 101.0}, OutOfRange, "true_cfg_scale: 101"),
        ({"width": 34}, OutOfRange, "not a positive multiple of 4"),
        ({"prompt_embeds": torch.zeros(1, 25, 32)}, OutOfRange, "prompt_embeds: 25 tokens are more than 24"),
        ({"prompt_embeds": torch.zeros(1, 24, 32)}, RequestError, "pooled_prompt_embeds: this model needs them"),
        (
            {"prompt_embeds": torch.zeros(1, 24, 32), "pooled_prompt_embeds": torch.zeros(1, 31)},
            OutOfRange,
            r"pooled_prompt_embeds: shape \(1, 31\) is not \(1, 32\)",
        ),
        (
            {"true_cfg_scale": 2.0, "negative_prompt_embeds": torch.zeros(1, 24, 31)},
            OutOfRange,
            "negative_prompt_embeds: shape",
        ),
        (
            {"true_cfg_scale": 2.0, "negative_prompt_embeds": torch.zeros(1, 24, 32)},
            RequestError,
            "negative_pooled_prompt_embeds: this model needs them",
        ),
        ({"quality": "low"}, RequestError, "quality: .* has no profile for this run"),
    ],
)
def test_what_a_request_may_not_ask(
    fields: dict[str, Any], error: type[RequestError], message: str, backbone_of: Backbones
) -> None:
    with pytest.raises(error, match=message):
        generate(backbone_of("flux-dev"), [Request(prompt=PROMPT, **fields)])


def test_a_prompt_costs_its_own_tokens(backbone_of: Backbones) -> None:
    """And padding up to a multiple of 32, where prompts have their own lengths; rows of a step the longer one's."""
    backbone = backbone_of("z-image")

    def macs(prompt: str, **fields: Any) -> int:
        fields = {"guidance_scale": 0.0, "num_inference_steps": 1, **fields}
        return generate(backbone, [Request(prompt=prompt, **fields)])[0].usage.macs

    short, long = macs("a ring"), macs("a ring" * 8)
    assert macs("a big ring") == short < long
    guided = {"guidance_scale": 2.0, "negative_prompt": "a ring" * 8}
    assert macs("a ring", **guided) == 2 * long
    embeds = torch.zeros(1, 40, 16)
    assert macs("", prompt_embeds=embeds) == long


def test_a_student_of_another_scale_is_told_by_the_field_that_scales(
    student_of: Backbones, backbone_of: Backbones
) -> None:
    backbone = student_of("flux-dev")
    student: dict[str, Any] = {"prompt": PROMPT, "acceleration": CfgStudent(), "num_inference_steps": 1}
    with pytest.raises(StudentConflict) as caught:
        generate(backbone, [Request(**student, true_cfg_scale=2.0)])
    assert caught.value.field == "true_cfg_scale"
    [result] = generate(backbone, [Request(**student, true_cfg_scale=3.0)])
    assert result.usage.rows == 1


def test_rows_of_a_plain_step(backbone_of: Backbones) -> None:
    flux, klein = backbone_of("flux-dev").spec, backbone_of("klein").spec
    assert plain_rows(flux, Request(prompt="")) == plain_rows(klein, Request(prompt="")) == 1
    assert plain_rows(flux, Request(prompt="", negative_prompt="x", true_cfg_scale=2.0)) == 2
    assert plain_rows(backbone_of("sd3").spec, Request(prompt="")) == 2


def test_a_scale_that_the_network_has_no_input_for(backbone_of: Backbones) -> None:
    with pytest.raises(OutOfRange, match=r"guidance_scale: 3.0 is not in 0..1"):
        generate(backbone_of("flux-schnell"), [Request(prompt=PROMPT, guidance_scale=3.0)])
    with pytest.raises(WrongBackbone, match="true_cfg_scale"):
        generate(backbone_of("sd"), [Request(prompt=PROMPT, true_cfg_scale=3.0)])


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("transformer/config.json", {"patch_size": 2}, "patch_size = 2 is not implemented"),
        ("transformer/config.json", {"nosuch": True}, "nosuch = True is not implemented"),
        ("model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]}, "DDIMScheduler; this family's networks"),
    ],
)
def test_what_is_not_understood_is_refused_at_loading(
    file: str, changes: dict[str, Any], message: str, pipeline_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(pipeline_dir("flux-dev"), tmp_path / "model")
    config = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelLoadError, match=message):
        load(str(directory), device="cpu", dtype="float32")


# Rows that do different things


def wishes(case: Case) -> list[dict[str, Any]]:
    """What requests of one batch ask for: other accelerators, lengths of prompt, sizes, steps, seeds."""
    asked: list[dict[str, Any]] = [
        {"prompt": "a ring", "num_inference_steps": 5},
        {"acceleration": DeltaDiT(interval=2, blocks=2, boundary=3, order=1), "num_inference_steps": 6},
        {"prompt": "", "acceleration": Forecast(interval=3), "num_inference_steps": 7},
        {"acceleration": DeltaDiT(interval=3, blocks=2, boundary=0), "num_inference_steps": 4, "width": 24},
        {"acceleration": [Forecast(evaluations=4, order=2), DeltaDiT(blocks=1)], "num_inference_steps": 9},
    ]
    if case.guided:
        late = [SelectiveGuidance(start=0.4), DeltaDiT(blocks=2)]
        asked += [
            {**case.guided, "acceleration": SelectiveGuidance(stop=0.5), "num_inference_steps": 4},
            {**case.guided, "acceleration": late, "num_inference_steps": 6, "prompt": "a ring" * 9},
            {**case.guided, "width": 24, "num_inference_steps": 3},
        ]
    return [{"prompt": PROMPT, **case.plain, **wish} for wish in asked]


@pytest.mark.parametrize("stepping", ["exact", "batched"])
@pytest.mark.parametrize("layout", CASES)
def test_alone_equals_mixed_and_staggered(
    layout: str, stepping: str, backbone_of: Backbones, batched_of: Backbones
) -> None:
    backbone = (backbone_of if stepping == "exact" else batched_of)(layout)
    asked = wishes(CASES[layout])
    requests = [Request(**{"seed": 20 + i, **wish}) for i, wish in enumerate(asked)]
    alone = [generate(backbone, [request])[0].latents for request in requests]
    waiting = [start(backbone, resolve(backbone.spec, backbone.scheduler_config, r)) for r in requests]
    everyone = [trajectory for started in waiting for trajectory in started]
    arriving, running = list(waiting), everyone[:0]
    turn = 0
    while arriving or running:
        running += arriving.pop(0) if arriving else []
        groups = list(dict.fromkeys(t.group for t in running))
        group = groups[turn % len(groups)]
        advance(backbone, [t for t in running if t.group == group])
        running = [t for t in running if not t.done]
        turn += 1
    for mixed, single in zip(everyone, alone, strict=True):
        assert float((mixed.latents - single).abs().max()) <= 2e-5 * float(single.abs().max())
    plain = [
        generate(backbone, [Request(**{**w, "seed": 20 + i, "acceleration": ()})])[0].latents
        for i, w in enumerate(asked)
    ]
    changed = [not torch.allclose(a, b, rtol=0, atol=1e-4) for a, b in zip(alone, plain, strict=True)]
    assert changed == [bool(w.get("acceleration")) for w in asked]
    del everyone, waiting, mixed, group
    assert backbone.features.nbytes == 0
