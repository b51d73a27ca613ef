"""Selective guidance against diffusers' own way of turning guidance off during a run: its step callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from models import Backbone, Request, generate
from models.accelerators import SelectiveGuidance
from tests.reference import by_pipeline, generators

TEXT = {"prompt": "a red circle", "negative_prompt": "dull", "num_inference_steps": 6, "guidance_scale": 3.0}


def unguided_from(step: int) -> Callable[..., dict[str, Any]]:
    def callback(pipeline: Any, done: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if done == step - 1:
            pipeline._guidance_scale = 1.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    return callback


@pytest.mark.parametrize(("stop", "step"), [(1.0, 6), (0.8, 5), (0.5, 3), (0.1, 1)])
def test_unguided_towards_the_end(
    stop: float, step: int, backbone_of: Callable[..., Backbone], pipeline_of: Callable[..., Any]
) -> None:
    request = Request(**TEXT, scheduler="ddim", acceleration=SelectiveGuidance(stop=stop))  # type: ignore[arg-type]
    [result] = generate(backbone_of("sd"), [request])
    drawn = by_pipeline(
        pipeline_of("sd"),
        "ddim",
        generator=generators(0, 1),
        callback_on_step_end=unguided_from(step),
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        **TEXT,  # type: ignore[arg-type]
    )
    assert torch.equal(result.latents, drawn.latents)
    assert result.usage.rows == 6 + step
