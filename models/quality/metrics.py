"""How good pictures are: likeness to a reference, and the distance between two sets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

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


@dataclass(frozen=True)
class Likeness:
    """How near pictures come to others, on average: PSNR in decibels with its standard error, and SSIM.

    One picture has no standard error.
    """

    psnr: float
    psnr_error: float | None
    ssim: float

    @classmethod
    def of(cls, pictures: Sequence[Image.Image], references: Sequence[Image.Image]) -> Likeness:
        """Of pictures of equal number and size, one by one."""
        pairs = list(zip(pictures, references, strict=True))
        values = [psnr(*pair) for pair in pairs]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error, statistics.fmean(ssim(*pair) for pair in pairs))


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
