"""The analytic checker: right on fresh pictures, not to be fooled by wrong captions."""

import random
from dataclasses import astuple, fields
from itertools import islice

import pytest
from PIL import Image

from models.shapes.checker import Verdict, check, look
from models.shapes.shapes import Scene, Thing, draw, render, sample_scenes

SCENE = Scene("white", (Thing("large", "red", "circle"), Thing("small", "blue", "square")), "above")


@pytest.fixture(scope="module")
def gallery() -> list[tuple[Image.Image, str]]:
    rng = random.Random(17)
    scenes = islice(sample_scenes(23, held_out=False), 200)
    return [(render(scene, rng), scene.caption) for scene in scenes]


def test_fresh_renders_are_right(gallery: list[tuple[Image.Image, str]]) -> None:
    right = sum(check(picture, caption).all for picture, caption in gallery)
    assert right / len(gallery) >= 0.99


def test_shuffled_captions_fail(gallery: list[tuple[Image.Image, str]]) -> None:
    captions = [caption for _, caption in gallery]
    shuffled = zip((picture for picture, _ in gallery), captions[1:] + captions[:1], strict=True)
    assert sum(check(picture, caption).all for picture, caption in shuffled) / len(gallery) <= 0.01


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        ("a large red circle above a small blue square on a white background", []),
        ("a large red circle above a small blue square on a black background", ["background"]),
        ("a large red circle above a small green square on a white background", ["colours"]),
        ("a large red circle above a small blue star on a white background", ["shapes"]),
        ("a large red circle above a large blue square on a white background", ["sizes"]),
        ("a large red circle below a small blue square on a white background", ["relation"]),
        ("a large red circle to the left of a small blue square on a white background", ["relation"]),
        ("a small blue square below a large red circle on a white background", []),
        ("a large red circle on a white background", ["colours", "shapes", "sizes", "relation"]),
    ],
)
def test_each_claim_is_judged_on_its_own(caption: str, wrong: list[str]) -> None:
    verdict = check(render(SCENE, random.Random(0)), caption)
    assert [claim.name for claim in fields(Verdict) if not getattr(verdict, claim.name)] == wrong
    assert verdict.all == (not wrong)


def test_looking_finds_colour_shape_size_and_place() -> None:
    background, (large, small) = look(draw(SCENE, ((30.0, 18.0), (34.0, 46.0))))
    assert background == "white"
    assert (large.size, large.colour, large.shape) == ("large", "red", "circle")
    assert (small.size, small.colour, small.shape) == ("small", "blue", "square")
    assert (large.x, large.y) == pytest.approx((30.0, 18.0), abs=1.0)
    assert (small.x, small.y) == pytest.approx((34.0, 46.0), abs=1.0)


def test_an_empty_picture_keeps_only_the_background() -> None:
    verdict = check(Image.new("RGB", (64, 64), (245, 245, 245)), SCENE.caption)
    assert astuple(verdict) == (True, False, False, False, False)


def test_another_size_of_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="64x64"):
        look(Image.new("RGB", (32, 32)))
