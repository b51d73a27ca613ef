"""A short digest of weights: whether a model is the one that it was, without reading all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

SAMPLES = 64
"""Values of each tensor that are looked at, evenly over it: training or another file changes them all."""


@torch.inference_mode()
def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of names, shapes, types and samples of tensors, in the order given; waits for the device once."""
    sha, samples = hashlib.sha256(), []
    for name, tensor in tensors:
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        flat = tensor.detach().reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].to(torch.float64))
    if samples:
        sha.update(torch.cat(samples).cpu().numpy().tobytes())
    return sha.hexdigest()[:32]
