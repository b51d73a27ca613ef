"""How good pictures are: likeness to a reference, truth to the caption, and distance between two sets."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from models.shapes.checker import Verdict, check
from models.shapes.shapes import SIDE, parse_caption, render

MOST_PSNR = 100.0  # decibels; what identical pictures count as in a mean


def psnr(picture: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio of two RGB pictures of equal size in decibels, at most MOST_PSNR."""
    a, b = np.asarray(reference.convert("RGB")), np.asarray(picture.convert("RGB"))
    if np.array_equal(a, b):
        return MOST_PSNR
    return min(float(peak_signal_noise_ratio(a, b, data_range=255)), MOST_PSNR)


def ssim(picture: Image.Image, reference: Image.Image) -> float:
    """Structural similarity (Wang et al., 2004) of two RGB pictures of equal size, at most 1."""
    a, b = np.asarray(reference.convert("RGB")), np.asarray(picture.convert("RGB"))
    return float(structural_similarity(a, b, data_range=255, channel_axis=2))


def alignment(pictures: Sequence[Image.Image], captions: Sequence[str]) -> dict[str, float] | None:
    """The share of pictures that keep each claim of their caption, and under `all` every claim.

    None where the captions are outside the grammar of shapes or the pictures of another size.
    """
    if not readable(pictures, captions):
        return None
    verdicts = [check(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
    names = [*(field.name for field in fields(Verdict)), "all"]
    return {name: sum(getattr(verdict, name) for verdict in verdicts) / len(verdicts) for name in names}


def readable(pictures: Sequence[Image.Image], captions: Sequence[str]) -> bool:
    """Whether these are pictures and captions of the shapes world."""
    try:
        for caption in captions:
            parse_caption(caption)
    except ValueError:
        return False
    return bool(pictures) and all(picture.size == (SIDE, SIDE) for picture in pictures)


def rendered(captions: Sequence[str], count: int, seed: int = 0) -> list[Image.Image]:
    """At least `count` true pictures of these captions, the same number of each: the reference set of `frechet`."""
    rng = random.Random(seed)
    rounds = -(-count // len(captions))
    return [render(parse_caption(caption), rng) for _ in range(rounds) for caption in captions]


def frechet(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features [pictures, dim] (Heusel et al., 2017).

    Biased upwards where there are few pictures: compare only distances of equally many.
    """
    a, b = (t.double().numpy() for t in (features, reference))
    mean = a.mean(axis=0) - b.mean(axis=0)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    crossed: NDArray[np.complex128] = np.linalg.eigvals(first @ second)
    root = np.sqrt(crossed.real.clip(min=0.0)).sum()
    return float(mean @ mean + np.trace(first) + np.trace(second) - 2 * root)
