"""From a request to a run: every default, every bound from both sides, and what the run says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from models.accelerators import CfgStudent, DeepCache, DiTFastAttn, SelectiveGuidance
from models.errors import OutOfRange, PlanMismatch, RequestError, WrongBackbone
from models.request import Request, Run
from models.resolve import MAX_SEED, resolve
from models.search.attention_plan import Plan
from models.spec import AdapterInfo, ModelSpec
from tests.unit.specs import class_spec, dit_spec, unet_spec

CONFIG = DDIMScheduler().config
WIDE = unet_spec(
    native_width=96,
    native_height=64,
    default_scheduler="euler",
    default_steps=7,
    default_guidance_scale=3.0,
    schedulers=("ddim", "euler", "heun", "pndm"),
)
PICTURE = Image.new("RGB", (8, 8))


def resolved(model: ModelSpec = WIDE, **options: Any) -> Run:
    return resolve(model, CONFIG, Request(**{"prompt": "a ring", **options}))


def test_defaults_are_the_models_own() -> None:
    run = resolved()
    assert (run.width, run.height) == (96, 64)
    assert (run.scheduler, run.num_inference_steps, run.guidance_scale) == ("euler", 7, 3.0)
    assert (run.seeds, run.accelerators, run.adapter, run.guided) == ((0,), (), None, True)
    assert type(run.schedule.scheduler).__name__ == "EulerDiscreteScheduler"
    assert (len(run.steps), len(run.schedule.timesteps), run.schedule.begin) == (7, 7, 0)


def test_what_is_asked_for_goes_before_the_defaults() -> None:
    run = resolved(width=64, height=72, scheduler="ddim", num_inference_steps=4, guidance_scale=1.5, seed=9)
    assert (run.width, run.height, run.seeds) == (64, 72, (9,))
    assert (run.scheduler, run.num_inference_steps, run.guidance_scale) == ("ddim", 4, 1.5)
    assert type(run.schedule.scheduler).__name__ == "DDIMScheduler"


@pytest.mark.parametrize(("given", "size"), [({"width": 32}, (32, 64)), ({"height": 32}, (96, 32))])
def test_one_side_leaves_the_other_native(given: dict[str, Any], size: tuple[int, int]) -> None:
    run = resolved(**given)
    assert (run.width, run.height) == size


def test_a_step_is_an_evaluation() -> None:
    assert len(resolved(scheduler="heun").steps) == 13
    assert len(resolved(scheduler="pndm", num_inference_steps=10).steps) == 19


@pytest.mark.parametrize(("scale", "guided"), [(0.0, False), (1.0, False), (1.01, True), (100.0, True)])
def test_a_run_is_guided_above_one(scale: float, guided: bool) -> None:
    run = resolved(guidance_scale=scale)
    assert run.guided is guided
    assert run.guidance_scale == scale
    assert [step.num_rows for step in run.steps] == [2 if guided else 1] * 7


def test_a_model_whose_default_is_one_is_unguided() -> None:
    assert not resolved(unet_spec(default_guidance_scale=1.0)).guided


BOUNDS: list[tuple[str, list[Any], list[Any]]] = [
    ("guidance_scale", [0.0, 100.0], [-0.01, 100.01]),
    ("timestep_warp", [0.05, 20.0], [0.049, 20.01]),
    ("num_inference_steps", [1, 1000], [0, 1001]),
    ("num_images", [1, 10_000], [0, 10_001]),
    ("seed", [0, MAX_SEED - 1], [-1, MAX_SEED]),
    ("width", [8, 104], [0, 4, 100]),
    ("height", [8, 104], [-8, 12, 100]),
]


@pytest.mark.parametrize(("field", "inside", "outside"), BOUNDS)
def test_every_bound_from_both_sides(field: str, inside: list[Any], outside: list[Any]) -> None:
    for value in inside:
        resolved(scheduler="ddim", **{field: value})
    for value in outside:
        with pytest.raises(OutOfRange) as caught:
            resolved(scheduler="ddim", **{field: value})
        assert caught.value.field == field


def test_images_are_seeded_one_after_another_up_to_the_last_seed() -> None:
    assert resolved(seed=5, num_images=3).seeds == (5, 6, 7)
    assert max(resolved(seed=MAX_SEED - 3, num_images=3).seeds) < MAX_SEED == 2**63 - 1
    with pytest.raises(OutOfRange, match=rf"seed: {MAX_SEED - 2} is not in 0\.\.{MAX_SEED - 3}"):
        resolved(seed=MAX_SEED - 2, num_images=3)


@pytest.mark.parametrize(
    ("strength", "steps", "left"),
    [(1.0, 10, 10), (0.8, 10, 8), (0.55, 10, 5), (0.59, 10, 5), (0.1, 10, 1), (0.8, 25, 20), (0.5, 7, 3)],
)
def test_strength_is_the_share_of_the_steps_that_are_run(strength: float, steps: int, left: int) -> None:
    run = resolved(image=PICTURE, strength=strength, num_inference_steps=steps, scheduler="ddim")
    whole = resolved(num_inference_steps=steps, scheduler="ddim")
    assert run.schedule.begin == steps - left
    assert len(run.steps) == left
    assert run.schedule.timesteps.tolist() == whole.schedule.timesteps.tolist()[-left:]
    assert run.num_inference_steps == steps


def test_strength_is_for_pictures() -> None:
    """Without an image all steps are run, whatever the strength; bounds are held only where it counts."""
    assert resolved(strength=0.1).schedule.begin == 0
    assert resolved(strength=7.0).schedule.begin == 0
    for strength in (-0.1, 1.01):
        with pytest.raises(OutOfRange, match="strength"):
            resolved(strength=strength, image=PICTURE)


def test_a_warp_changes_the_time_steps() -> None:
    noisy, plain = (resolved(scheduler="ddim", timestep_warp=gamma) for gamma in (0.5, 1.0))
    assert float(noisy.schedule.timesteps.sum()) > float(plain.schedule.timesteps.sum())


def test_starting_noise_is_one_latent_an_image_of_the_runs_size() -> None:
    shape = (2, 4, 9, 5)  # height before width, an eighth of the pixels
    resolved(latents=torch.zeros(shape), num_images=2, width=40, height=72)
    for wrong in ((1, 4, 9, 5), (2, 3, 9, 5), (2, 4, 5, 9), (2, 4, 72, 40)):
        with pytest.raises(OutOfRange, match="latents") as caught:
            resolved(latents=torch.zeros(wrong), num_images=2, width=40, height=72)
        assert caught.value.reason == f"shape {wrong} is not {shape}"


CLASSES = class_spec()


@pytest.mark.parametrize("label", [0, 9])
def test_the_first_and_the_last_class(label: int) -> None:
    assert resolved(CLASSES, prompt=None, class_label=label).guided


@pytest.mark.parametrize("label", [-1, 10, None])
def test_labels_beyond_the_classes(label: int | None) -> None:
    with pytest.raises(OutOfRange, match=rf"class_label: {label} is not in 0\.\.9"):
        resolved(CLASSES, prompt=None, class_label=label)


def test_class_conditional_pictures_are_square() -> None:
    run = resolved(CLASSES, prompt=None, class_label=1, width=64, height=64)
    assert (run.width, run.height) == (64, 64)
    with pytest.raises(OutOfRange, match="dit makes square pictures only"):
        resolved(CLASSES, prompt=None, class_label=1, height=64)
    resolved(dit_spec(), width=64, height=32)  # transformers that read text draw any shape


def test_embeddings_stand_in_for_a_prompt_and_its_encoder() -> None:
    silent, embeds = unet_spec(has_text_encoder=False), torch.zeros(1, 7, 32)
    assert resolved(silent, prompt=None, prompt_embeds=embeds).guided
    resolved(prompt="")  # an empty prompt is one
    with pytest.raises(WrongBackbone, match="unet was loaded without a text encoder; give prompt_embeds"):
        resolved(silent)
    with pytest.raises(RequestError, match="prompt: is required"):
        resolved(silent, prompt=None)


def test_the_scheduler_is_one_of_the_models() -> None:
    with pytest.raises(WrongBackbone) as caught:
        resolved(scheduler="unipc")
    assert caught.value.reason == "'unipc' cannot end in pure noise as this model's schedule does; " + (
        "one of ddim, euler, heun, pndm"
    )
    with pytest.raises(WrongBackbone, match="'edm' is not known; one of ddim, euler, heun, pndm"):
        resolved(scheduler="edm")


def test_a_student_brings_its_scale_and_needs_one_row() -> None:
    students = {name: AdapterInfo(name, scale, 4, 100) for name, scale in (("two", 2.0), ("five", 5.0))}
    run = resolved(unet_spec(adapters=students), acceleration=[DeepCache(), CfgStudent(adapter="five")])
    assert (run.adapter, run.guidance_scale, run.guided) == ("five", 5.0, False)
    assert [a.mode for a in run.accelerators] == ["deepcache", "cfg_student"]
    assert [step.num_rows for step in run.steps] == [1] * 25


def test_guidance_may_be_for_a_part_of_the_run() -> None:
    run = resolved(num_inference_steps=10, acceleration=SelectiveGuidance(start=0.2, stop=0.5))
    assert [step.num_rows for step in run.steps] == [1, 1, 2, 2, 2, 1, 1, 1, 1, 1]
    assert run.guided


def _planned(tokens: int, **request: Any) -> Run:
    facts: dict[str, Any] = {"model": "dit", "config_hash": "hash", "scheduler": "ddim", "num_inference_steps": 2}
    table = [["full", "full"], ["ast", "full"]]
    plan = Plan(**facts, tokens=tokens, guidance=True, window=1, threshold=0.1, table=table)
    options = {"num_inference_steps": 2, "acceleration": DiTFastAttn(plan=plan), **request}
    return resolved(dit_spec(depth=2), **options)


def test_accelerators_see_the_size_that_was_asked_for() -> None:
    assert _planned(64).width == 128
    assert _planned(12, width=48, height=64).height == 64
    with pytest.raises(PlanMismatch, match="tokens: the plan is for 64, the request has 12"):
        _planned(64, width=48, height=64)


def test_plans_are_for_as_many_evaluations_as_image_to_image_leaves() -> None:
    with pytest.raises(PlanMismatch, match="steps: the plan is for 2, the request has 1"):
        _planned(64, image=PICTURE, strength=0.5)


def test_sizes_in_tokens_and_multiples() -> None:
    dit = dit_spec()
    assert dit.size_multiple == 16
    assert (dit.tokens(128, 64), dit.tokens(48, 32), WIDE.tokens(96, 64)) == (32, 6, 96)
    assert WIDE.size_multiple == 8


def test_adapters_and_plans_are_registered_by_name() -> None:
    info = AdapterInfo("a", 2.0, 4, 100)
    spec = dit_spec().with_extras({"a": info}, {})
    assert (dict(spec.adapters), dict(spec.plans)) == ({"a": info}, {})
    assert spec.native_width == 128
