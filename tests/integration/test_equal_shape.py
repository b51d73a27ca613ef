"""In exact stepping and at equal batch shape a row's latents are the same bits, whoever its neighbours are and wherever
in the batch it is: schedulers with a history as well. Where the shape differs the network itself rounds otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import models
from models import Request, advance
from models.generate import start
from models.resolve import resolve

NEIGHBOURS = ("ddim", "unipc", "euler", "dpmpp_2m", "lcm", "heun", "pndm")


@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m", "dpmpp_2m_karras", "unipc"])
def test_a_row_is_the_same_bits_beside_any_others(pipeline_dir: Callable[[str], Path], scheduler: str) -> None:
    backbone = models.load(str(pipeline_dir("sd")), device="cpu", dtype="float32", stepping="exact")

    def latents(rows: list[tuple[int, str]], place: int) -> list[torch.Tensor]:
        """Of one row after each of its steps; rows are seeds and schedulers."""
        running = []
        for seed, name in rows:
            request = Request(prompt="a ring", seed=seed, num_inference_steps=8, scheduler=name)
            running.append(start(backbone, resolve(backbone.spec, backbone.scheduler_config, request))[0])
        found = []
        for _ in range(7):
            advance(backbone, running)
            found.append(running[place].latents.clone())
        return found

    alike = latents([(7, scheduler)] * 8, 0)
    for place in (0, 3, 7):
        others = [(seed, NEIGHBOURS[seed % len(NEIGHBOURS)]) for seed in range(20, 27)]
        mixed = latents([*others[:place], (7, scheduler), *others[place:]], place)
        for step, (one, other) in enumerate(zip(alike, mixed, strict=True)):
            assert torch.equal(one, other), (place, step)
