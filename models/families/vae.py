"""What families share between latents and pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor


def decode(vae: Any, latents: Tensor) -> Tensor:
    """The VAE's own latents [images, channels, h, w] to pixels [images, height, width, 3] as bytes, on the device."""
    pixels: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    unit = (pixels * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    return (unit.float() * 255).round().to(torch.uint8)


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Pixels [images, height, width, 3] as bytes on the CPU to pictures."""
    return [Image.fromarray(one) for one in pixels.numpy()]


def as_pixels(picture: Image.Image, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A picture of the right size as [1, 3, height, width] from 0 to 1."""
    processor = VaeImageProcessor(do_resize=False, do_convert_rgb=True, do_normalize=False)
    pixels: Tensor = processor.preprocess(picture).to(device, dtype)
    return pixels.contiguous()


def posterior(vae: Any, picture: Image.Image, device: torch.device, mask: Image.Image | None = None) -> Any:
    """A picture of the right size to the distribution of its latents: diffusers' `DiagonalGaussianDistribution`.

    Under a mask (mode L, 255 inside) it is grey.
    """
    pixels = VaeImageProcessor(do_resize=False).preprocess(picture)
    if mask is not None:
        pixels = pixels * (torch.from_numpy(np.array(mask)) < 128)
    return vae.encode(pixels.to(device, vae.dtype)).latent_dist
