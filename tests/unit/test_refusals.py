"""Every refusal is a typed error that names the field and the reason."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from models.accelerators import (
    AdaptiveDeepCache,
    CfgStudent,
    DeepCache,
    DeltaDiT,
    DepthSkip,
    DiTFastAttn,
    FirstBlockCache,
    Forecast,
    MagCache,
    NoAcceleration,
    SelectiveGuidance,
    TaylorSeer,
    TeaCache,
)
from models.errors import (
    AcceleratorConflict,
    GuidanceRequired,
    NoProfile,
    OutOfRange,
    PlanMismatch,
    RequestError,
    StudentConflict,
    WrongBackbone,
)
from models.request import Request
from models.resolve import resolve
from models.search.attention_plan import Plan
from models.solvers.names import supported
from models.spec import AdapterInfo, ModelSpec
from tests.unit.specs import DIT_SITES, dit_spec, unet_spec

CONFIG = DDIMScheduler().config
UNET, DIT = unet_spec(), dit_spec(depth=2)
CLASSES = dit_spec(
    takes="class_label",
    inputs=frozenset({"class_label"}),
    square=True,
    image_to_image=False,
    num_classes=1000,
    has_text_encoder=False,
)
SILENT = unet_spec(has_text_encoder=False)
ZERO_SNR = unet_spec(schedulers=supported({"rescale_betas_zero_snr": True}))
TWO_STUDENTS = unet_spec(adapters={n: AdapterInfo(n, 4.0, 4, 100) for n in ("first", "second")})
CACHE, SHARE = DeepCache(), CfgStudent()


def plan(**changes: Any) -> DiTFastAttn:
    """A plan that fits a guided run of 3 DDIM steps on `DIT`."""
    facts = {
        "model": "dit",
        "config_hash": "hash",
        "scheduler": "ddim",
        "num_inference_steps": 3,
        "tokens": 64,
        "guidance": True,
        "window": 7,
        "threshold": 0.1,
        "table": [["full", "full"], ["ast", "full"], ["ast", "full"]],
    }
    return DiTFastAttn(plan=Plan.model_validate({**facts, **changes}))


SHARED = {"table": [["full", "full"], ["asc", "full"], ["ast", "full"]]}
THREE = {"num_inference_steps": 3}

REFUSALS: list[tuple[ModelSpec, dict[str, Any], type[RequestError], str, str]] = [
    # An accelerator on the wrong backbone.
    (DIT, {"acceleration": CACHE}, WrongBackbone, "acceleration.mode", "deepcache is for unet backbones, dit is a dit"),
    (DIT, {"acceleration": DepthSkip(depth=2)}, WrongBackbone, "acceleration.mode", "depth_skip is for unet"),
    (UNET, {"acceleration": DeltaDiT()}, WrongBackbone, "acceleration.mode", "delta_dit is for dit backbones"),
    (UNET, {"acceleration": plan()}, WrongBackbone, "acceleration.mode", "ditfastattn is for dit backbones"),
    # Two accelerators on one field.
    (
        UNET,
        {"acceleration": [CACHE, DepthSkip(depth=2)]},
        AcceleratorConflict,
        "acceleration",
        "deepcache and depth_skip both decide the exit",
    ),
    (UNET, {"acceleration": [CACHE, CACHE]}, AcceleratorConflict, "acceleration", "deepcache and deepcache"),
    (
        UNET,
        {"acceleration": [SHARE, SelectiveGuidance()]},
        AcceleratorConflict,
        "acceleration",
        "cfg_student and selective_guidance both decide the guidance",
    ),
    (DIT, {"acceleration": [DeltaDiT(), DeltaDiT()]}, AcceleratorConflict, "acceleration", "delta_dit and delta_dit"),
    (DIT, {"acceleration": [plan(), plan()]}, AcceleratorConflict, "acceleration", "both decide the attention"),
    *[
        (model, {"acceleration": pair}, AcceleratorConflict, "acceleration", f"both decide the {claim} of a step")
        for model, claim, pair in (
            (UNET, "exit", [CACHE, AdaptiveDeepCache()]),
            (UNET, "exit", [DepthSkip(depth=2), AdaptiveDeepCache()]),
            (DIT, "cached", [DeltaDiT(), FirstBlockCache()]),
            (DIT, "cached", [DeltaDiT(), MagCache()]),
            (DIT, "attention", [plan(), FirstBlockCache()]),
            (DIT, "attention", [plan(), TeaCache()]),
            (DIT, "attention", [FirstBlockCache(), TeaCache()]),
            (DIT, "cached", [MagCache(), TeaCache()]),
            (DIT, "cached", [DeltaDiT(), TaylorSeer()]),
            (DIT, "attention", [plan(), TaylorSeer()]),
        )
    ],
    (DIT, {"acceleration": MagCache()}, NoProfile, "acceleration.ratios", "slipstream calibrate --model dit"),
    (DIT, {"acceleration": TeaCache()}, NoProfile, "acceleration.coefficients", "slipstream calibrate --model dit"),
    (UNET, {"acceleration": FirstBlockCache()}, WrongBackbone, "acceleration.mode", "first_block_cache is for dit"),
    (
        dit_spec(1),
        {"acceleration": FirstBlockCache()},
        WrongBackbone,
        "acceleration.mode",
        "needs two blocks, dit has 1",
    ),
    (
        dit_spec(2, sites=replace(DIT_SITES, depth=2, offers=frozenset())),
        {"acceleration": TeaCache(coefficients=(1.0, 0.0))},
        WrongBackbone,
        "acceleration.mode",
        r"needs blocks 0\.\.2 gated by modulated, which dit does not offer",
    ),
    (
        dit_spec(2, sites=replace(DIT_SITES, depth=2, offers=frozenset())),
        {"acceleration": TaylorSeer()},
        WrongBackbone,
        "acceleration.mode",
        "needs feed_forward 0 recall, which dit does not offer",
    ),
    (UNET, {"acceleration": AdaptiveDeepCache(branch=12)}, OutOfRange, "acceleration.branch", r"12 is not in 0\.\.11"),
    # Sharing across guidance without guidance.
    (
        DIT,
        {"acceleration": plan(**SHARED), "guidance_scale": 1.0, **THREE},
        GuidanceRequired,
        "acceleration.plan",
        "which this run has not",
    ),
    (
        DIT,
        {"acceleration": [plan(**SHARED), SHARE], **THREE},
        GuidanceRequired,
        "acceleration.plan",
        "which this run has not",
    ),
    # A plan that was searched for something else.
    (DIT, {"acceleration": plan(), "num_inference_steps": 4}, PlanMismatch, "acceleration.plan", "num_inference_steps"),
    (DIT, {"acceleration": plan(), "scheduler": "euler", **THREE}, PlanMismatch, "acceleration.plan", "scheduler: "),
    (DIT, {"acceleration": plan(), "width": 256, **THREE}, PlanMismatch, "acceleration.plan", "tokens: .* 64, .* 128"),
    (DIT, {"acceleration": plan(), "guidance_scale": 1.0, **THREE}, PlanMismatch, "acceleration.plan", "guidance: "),
    (DIT, {"acceleration": plan(guidance=False), **THREE}, PlanMismatch, "acceleration.plan", "guidance: "),
    (DIT, {"acceleration": plan(config_hash="x"), **THREE}, PlanMismatch, "acceleration.plan", "model: .* x, .* hash"),
    (
        DIT,
        {"acceleration": plan(table=[["full"]] * 3), **THREE},
        PlanMismatch,
        "acceleration.plan",
        "blocks: .* 1, .* 2",
    ),
    (DIT, {"acceleration": DiTFastAttn(plan="lost")}, PlanMismatch, "acceleration.plan", "no plan 'lost'"),
    (
        DIT,
        {"acceleration": plan(scheduler="heun"), "scheduler": "heun", **THREE},
        PlanMismatch,
        "acceleration.plan",
        "steps: .* 3, .* 5",
    ),
    # What a student has baked in.
    (
        UNET,
        {"acceleration": SHARE, "guidance_scale": 7.5},
        StudentConflict,
        "guidance_scale",
        "distilled at 4, not 7.5",
    ),
    (UNET, {"acceleration": SHARE, "guidance_scale": 1.0}, StudentConflict, "guidance_scale", "distilled at 4, not 1"),
    (UNET, {"acceleration": SHARE, "negative_prompt": "dull"}, StudentConflict, "negative_prompt", "cannot be set"),
    (
        UNET,
        {"acceleration": SHARE, "negative_prompt_embeds": torch.zeros(1, 1, 8)},
        StudentConflict,
        "negative_prompt",
        "cannot be set",
    ),
    (UNET, {"acceleration": CfgStudent(adapter="x")}, StudentConflict, "acceleration.adapter", "'x' is no student"),
    (TWO_STUDENTS, {"acceleration": SHARE}, StudentConflict, "acceleration.adapter", "first, second"),
    (unet_spec(adapters={}), {"acceleration": SHARE}, StudentConflict, "acceleration.adapter", "none"),
    # Accelerators beyond the model.
    (UNET, {"acceleration": DeepCache(branch=12)}, OutOfRange, "acceleration.branch", r"12 is not in 0\.\.11"),
    (UNET, {"acceleration": DepthSkip(depth=13)}, OutOfRange, "acceleration.depth", r"13 is not in 1\.\.12"),
    (DIT, {"acceleration": DeltaDiT(blocks=2)}, OutOfRange, "acceleration.blocks", r"2 is not in 1\.\.1"),
    # Sizes, counts and numbers.
    (UNET, {"width": 500}, OutOfRange, "width", "500 is not a positive multiple of 8"),
    (DIT, {"height": 24}, OutOfRange, "height", "24 is not a positive multiple of 16"),
    (UNET, {"height": -8}, OutOfRange, "height", "-8"),
    (UNET, {"width": 0}, OutOfRange, "width", "0 is not a positive multiple"),
    (CLASSES, {"prompt": None, "class_label": 1, "width": 256}, OutOfRange, "height", "square pictures only"),
    (UNET, {"num_inference_steps": 0}, OutOfRange, "num_inference_steps", r"0 is not in 1\.\.1000"),
    (UNET, {"num_inference_steps": 1001}, OutOfRange, "num_inference_steps", r"1001 is not in 1\.\.1000"),
    (UNET, {"num_images": 0}, OutOfRange, "num_images", "0 is not in 1"),
    (UNET, {"seed": -1}, OutOfRange, "seed", "-1 is not in 0"),
    (UNET, {"seed": 2**63}, OutOfRange, "seed", "is not in"),
    (UNET, {"guidance_scale": math.nan}, OutOfRange, "guidance_scale", "nan"),
    (UNET, {"guidance_scale": math.inf}, OutOfRange, "guidance_scale", "inf"),
    (UNET, {"guidance_scale": -1.0}, OutOfRange, "guidance_scale", "-1.0 is not in 0..100"),
    (UNET, {"latents": torch.zeros(1, 4, 8, 8)}, OutOfRange, "latents", r"\(1, 4, 8, 8\) is not \(1, 4, 64, 64\)"),
    # Image-to-image.
    (UNET, {"image": Image.new("RGB", (8, 8)), "strength": 1.5}, OutOfRange, "strength", "1.5 is not in 0..1"),
    (UNET, {"image": Image.new("RGB", (8, 8)), "strength": 0.0}, OutOfRange, "strength", "leaves none"),
    (
        UNET,
        {"image": Image.new("RGB", (8, 8)), "strength": 0.1, "num_inference_steps": 5},
        OutOfRange,
        "strength",
        "0.1 of 5 steps leaves none to run",
    ),
    (
        CLASSES,
        {"prompt": None, "class_label": 1, "image": Image.new("RGB", (8, 8))},
        WrongBackbone,
        "image",
        "no image-to-image",
    ),
    # Prompts and labels.
    (UNET, {"prompt": None}, RequestError, "prompt", "is required"),
    (SILENT, {}, WrongBackbone, "prompt", "without a text encoder"),
    (CLASSES, {"prompt": None}, OutOfRange, "class_label", r"None is not in 0\.\.999"),
    (CLASSES, {"prompt": None, "class_label": 1000}, OutOfRange, "class_label", r"1000 is not in 0\.\.999"),
    # Schedulers and time steps.
    (UNET, {"scheduler": "edm"}, WrongBackbone, "scheduler", "'edm' is not known; one of ddim"),
    (ZERO_SNR, {"scheduler": "pndm"}, WrongBackbone, "scheduler", "cannot end in pure noise"),
    (ZERO_SNR, {"scheduler": "heun"}, WrongBackbone, "scheduler", "cannot end in pure noise"),
    (UNET, {"timestep_warp": 0.0}, OutOfRange, "timestep_warp", "0.0 is not in"),
    (UNET, {"timestep_warp": math.nan}, OutOfRange, "timestep_warp", "nan"),
    (UNET, {"timestep_warp": 2.0, "scheduler": "euler"}, RequestError, "timestep_warp", "these do: ddim, dpmpp_2m"),
]


@pytest.mark.parametrize(("model", "options", "kind", "field", "reason"), REFUSALS)
def test_refusals(model: ModelSpec, options: dict[str, Any], kind: type[RequestError], field: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        resolve(model, CONFIG, Request(**{"prompt": "a ring", **options}))
    assert type(caught.value) is kind
    assert caught.value.field == field
    assert str(caught.value) == f"{field}: {caught.value.reason}"


ACCEPTED: list[tuple[ModelSpec, dict[str, Any], tuple[str, ...]]] = [
    (UNET, {"acceleration": NoAcceleration()}, ()),
    (UNET, {"acceleration": [SHARE, CACHE]}, ("cfg_student", "deepcache")),
    (UNET, {"acceleration": SHARE, "guidance_scale": 4.0}, ("cfg_student",)),
    (UNET, {"acceleration": SHARE, "negative_prompt": ""}, ("cfg_student",)),
    (UNET, {"acceleration": [SelectiveGuidance(), CACHE]}, ("selective_guidance", "deepcache")),
    (
        UNET,
        {"acceleration": DepthSkip(depth=9), "timestep_warp": 0.5, "image": Image.new("RGB", (8, 8))},
        ("depth_skip",),
    ),
    (DIT, {"acceleration": [plan(), DeltaDiT()], **THREE}, ("ditfastattn", "delta_dit")),
    (DIT, {"acceleration": [plan(guidance=False), SHARE], **THREE}, ("ditfastattn", "cfg_student")),
    (DIT, {"acceleration": [plan(**SHARED), SelectiveGuidance()], **THREE}, ("ditfastattn", "selective_guidance")),
    (DIT, {"acceleration": [SHARE, DeltaDiT()]}, ("cfg_student", "delta_dit")),
    (UNET, {"acceleration": [SHARE, AdaptiveDeepCache()]}, ("cfg_student", "adaptive_deepcache")),
    (UNET, {"acceleration": [Forecast(), AdaptiveDeepCache()]}, ("forecast", "adaptive_deepcache")),
    (DIT, {"acceleration": [SelectiveGuidance(), FirstBlockCache()]}, ("selective_guidance", "first_block_cache")),
    (DIT, {"acceleration": [SHARE, TeaCache(coefficients=(1.0, 0.0))]}, ("cfg_student", "teacache")),
    (DIT, {"acceleration": [plan(), MagCache(ratios=(1.0,))], **THREE}, ("ditfastattn", "magcache")),
    (DIT, {"acceleration": [SHARE, TaylorSeer()]}, ("cfg_student", "taylorseer")),
    (DIT, {"acceleration": [Forecast(), TaylorSeer(interval=2)]}, ("forecast", "taylorseer")),
    (DIT, {"acceleration": [Forecast(), MagCache(ratios=(1.0,))]}, ("forecast", "magcache")),
]


@pytest.mark.parametrize(("model", "options", "modes"), ACCEPTED)
def test_what_composes(model: ModelSpec, options: dict[str, Any], modes: tuple[str, ...]) -> None:
    run = resolve(model, CONFIG, Request(**{"prompt": "a ring", **options}))
    assert tuple(accelerator.mode for accelerator in run.accelerators) == modes


def test_defaults() -> None:
    run = resolve(UNET, CONFIG, Request(prompt="a ring", seed=5, num_images=2))
    assert (run.width, run.height, run.scheduler, run.num_inference_steps) == (512, 512, "ddim", 25)
    assert (run.guidance_scale, run.seeds, run.guided) == (4.0, (5, 6), True)


def test_a_student_runs_at_its_own_scale_in_one_row() -> None:
    run = resolve(unet_spec(default_guidance_scale=7.5), CONFIG, Request(prompt="a ring", acceleration=SHARE))
    assert (run.guidance_scale, run.guided, run.adapter) == (4.0, False, "student")
