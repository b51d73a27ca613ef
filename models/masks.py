"""Masks: what of a picture is made anew, while the latents outside follow the picture's own at every noise level.

After each step the latents outside the mask are those of the picture, noised to the level of the step that follows,
always with the noise that the run began with: Lugmayr et al. (2022) without going back, as in diffusers' pipelines.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.errors import OutOfRange

THRESHOLD = 128
"""From this grey level on a pixel is made anew."""


def painted(mask: Image.Image, picture: Image.Image) -> Image.Image:
    """A mask as mode L, 255 where the picture is made anew: where it is transparent, or white without transparency.

    Raises `OutOfRange` for a mask of another size than its picture, and for one that has only colours.
    """
    if mask.size != picture.size:
        wanted = "x".join(map(str, picture.size))
        raise OutOfRange("mask", f"{mask.width}x{mask.height} is not the size of the image, {wanted}")
    if mask.mode.startswith("I"):  # 16-bit grey; Pillow would cut it off at 255
        return Image.fromarray((np.asarray(mask).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if mask.has_transparency_data:
        alpha = mask.convert("RGBA").getchannel("A")
        return alpha.point(lambda level: 255 - level)
    if mask.mode in ("1", "L"):
        return mask.convert("L")
    raise OutOfRange("mask", f"mode {mask.mode} says nothing: it needs transparency, or shades of grey alone")


def resized(mask: Image.Image, width: int, height: int) -> Image.Image:
    """A mask of mode L at the size of a run, 0 or 255, as diffusers resizes and then decides."""
    whole = mask.resize((width, height), Image.Resampling.LANCZOS)
    return whole.point(lambda level: 255 if level >= THRESHOLD else 0)


def weights(mask: Image.Image, height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What of each latent pixel is made anew, 0 or 1, [1, 1, height, width], from a mask of pixels 0 or 255."""
    pixels = torch.from_numpy(np.asarray(mask) / np.float32(255))[None, None]
    return torch.nn.functional.interpolate(pixels, size=(height, width)).to(device, dtype)


@dataclass(frozen=True, slots=True)
class Outside:
    """What a trajectory keeps of its picture: `clean` latents and the run's `noise` [1, channels, h, w], and where the
    sample is its own, `inside` [1, 1, h, w]."""

    clean: Tensor
    noise: Tensor
    inside: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return self.clean.nbytes + self.noise.nbytes + self.inside.nbytes


def blend(sample: Tensor, original: Tensor, inside: Tensor) -> Tensor:
    """The sample inside, the original outside, as diffusers weighs them; [rows, channels, h, w] each."""
    return (1 - inside) * original + inside * sample


def outside_bytes(channels: int, height: int, width: int, itemsize: int) -> int:
    """Bytes of an `Outside` for latents of this size."""
    return (2 * channels + 1) * height * width * itemsize


def beside_bytes(channels: int, height: int, width: int, itemsize: int) -> int:
    """Bytes of the mask and the masked picture's latents where the network is given both."""
    return (channels + 1) * height * width * itemsize
