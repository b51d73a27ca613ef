"""`batch_invariant`: bit for bit the same picture, whatever else is asked for meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from models import Backbone, Request, generate
from models.backbone import Stepping
from models.families.prompts import PromptCache
from tests.integration.test_mixed import CASES, request

Backbones = Callable[..., Backbone]


def invariant(backbone: Backbone) -> Backbone:
    """As `load(batch_invariant=True)` makes it, with nothing encoded yet."""
    parts = replace(backbone.parts, prompts=PromptCache(alone=True))
    return replace(backbone, parts=parts, batch_invariant=True)


@pytest.mark.parametrize("stepping", ["exact", "batched"])
@pytest.mark.parametrize("layout", CASES)
def test_every_case_at_once_is_every_case_alone(layout: str, stepping: Stepping, student_of: Backbones) -> None:
    backbone = replace(student_of(layout), stepping=stepping)
    requests = [request(layout, name, backbone) for name in CASES[layout]]
    requests.append(replace(requests[0], num_images=3, seed=40))
    requests.append(replace(requests[1], width=backbone.spec.native_width * 2 if layout != "dit" else None))
    together = generate(invariant(backbone), requests)
    for asked, mixed in zip(requests, together, strict=True):
        [alone] = generate(invariant(backbone), [asked])
        assert torch.equal(mixed.latents, alone.latents), asked
        for ours, theirs in zip(mixed.images, alone.images, strict=True):
            assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_images_of_one_request_are_those_of_their_seeds(student_of: Backbones) -> None:
    backbone = student_of("sd")
    asked = Request(prompt="a ring", seed=7, num_inference_steps=3, num_images=3)
    [three] = generate(invariant(backbone), [asked])
    for seed, latents in zip((7, 8, 9), three.latents, strict=True):
        [one] = generate(invariant(backbone), [replace(asked, seed=seed, num_images=1)])
        assert torch.equal(one.latents[0], latents)
