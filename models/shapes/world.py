"""The shapes world as what students are distilled on: its captions, and its pictures."""

from __future__ import annotations

import random

from PIL import Image

from models.distill.data import Pictures, Prompts, World
from models.shapes.shapes import render, sample_scene


def prompts(seed: int = 0) -> Prompts:
    """Captions of the bundled models' world, without the combinations that are held out."""

    def prompt(number: int) -> str:
        rng = random.Random(f"{seed}/{number}")
        while (scene := sample_scene(rng, pair_share=0.75)).held_out:
            pass
        return scene.caption

    return prompt


def pictures(count: int, seed: int = 0) -> Pictures:
    """Rendered scenes of the bundled models' world, without the combinations that are held out."""
    rng = random.Random(seed)
    pairs: list[tuple[Image.Image, str]] = []
    while len(pairs) < count:
        scene = sample_scene(rng, pair_share=0.75)
        if not scene.held_out:
            pairs.append((render(scene, rng), scene.caption))
    return pairs


SHAPES = World(prompts, pictures)
