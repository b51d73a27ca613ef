"""Between Pillow pictures and tensors, and grids of samples."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_tensor(pictures: Iterable[Image.Image]) -> Tensor:
    """RGB pictures as float32 [pictures, 3, height, width] in [-1, 1]."""
    stacked = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_pictures(images: Tensor) -> list[Image.Image]:
    """The inverse of `to_tensor`, clipped and rounded."""
    arrays = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def save_grid(pictures: Sequence[Image.Image], path: Path, columns: int = 8, scale: int = 2) -> None:
    """One PNG of all pictures, row by row, enlarged without smoothing."""
    width, height = (length + 2 for length in pictures[0].size)
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * width, rows * height), "grey")
    for index, picture in enumerate(pictures):
        grid.paste(picture, (index % columns * width, index // columns * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST).save(path)
