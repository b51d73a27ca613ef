"""shapes-edit as anybody gets it: plain diffusers loads it, and it carries out edits that it was never shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionInstructPix2PixPipeline
from safetensors.torch import load_file

import models
from models import Backbone, Request, generate
from models.accelerators import Accelerator, DepthSkip, Forecast
from models.shapes.editor import held_out_edits
from models.shapes.edits import EDIT_WORDS, judge
from models.shapes.tokenizers import words

FOLDER = Path(models.__file__).parent / "bundled" / "shapes-edit"
EDITS = held_out_edits(12)
DONE, BOTH = 4, 2


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return models.load("shapes-edit", device="cpu", dtype="float32")


def carried_out(backbone: Backbone, acceleration: Accelerator | Sequence[Accelerator] = ()) -> tuple[int, int]:
    """How many of `EDITS` are done, and how many with the rest as it was, in 10 steps."""
    requests = [
        Request(
            prompt=edit.instruction,
            image=edit.before.picture(),
            seed=i,
            num_inference_steps=10,
            acceleration=acceleration,
        )
        for i, edit in enumerate(EDITS)
    ]
    results = generate(backbone, requests)
    outcomes = [judge(result.images[0], edit) for result, edit in zip(results, EDITS, strict=True)]
    return sum(one.done for one in outcomes), sum(one.all for one in outcomes)


def test_it_edits(backbone: Backbone) -> None:
    done, both = carried_out(backbone)
    assert done >= DONE
    assert both >= BOTH


def test_a_forecast_edits_alike(backbone: Backbone) -> None:
    done, _ = carried_out(backbone, Forecast(interval=2, order=1, warmup=3))
    assert done >= DONE - 2


def test_less_of_it_still_loads(backbone: Backbone) -> None:
    """`--depth` leaves memory, and gives what `depth_skip` gives of the whole."""
    part = models.load("shapes-edit", device="cpu", dtype="float32", depth=4)
    assert part.weight_bytes() < 0.8 * backbone.weight_bytes()
    asked: dict[str, Any] = {"prompt": EDITS[0].instruction, "image": EDITS[0].before.picture()}
    asked |= {"num_inference_steps": 2}
    [one] = generate(part, [Request(**asked)])
    [other] = generate(backbone, [Request(**asked, acceleration=DepthSkip(depth=4))])
    assert torch.equal(one.latents, other.latents)


def test_the_directory_says_which_pipeline_it_is() -> None:
    pipeline = DiffusionPipeline.from_pretrained(FOLDER)
    assert isinstance(pipeline, StableDiffusionInstructPix2PixPipeline)
    assert [word for word in (*words(), *EDIT_WORDS) if len(pipeline.tokenizer.tokenize(word)) != 1] == []


def test_weights_are_small_finite_and_in_half_precision() -> None:
    weights = [weight for path in FOLDER.rglob("*.safetensors") for weight in load_file(path).values()]
    assert all(weight.dtype == torch.float16 and bool(weight.isfinite().all()) for weight in weights)
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 15e6


def test_the_defaults_are_complete(backbone: Backbone) -> None:
    defaults = json.loads((FOLDER / "slipstream.json").read_text())
    spec = backbone.spec
    assert (spec.edits, spec.native_width, spec.default_steps) == (True, 64, defaults["default_num_inference_steps"])
    assert spec.default_image_guidance_scale == defaults["default_image_guidance_scale"]
    assert len(spec.examples) == 8
