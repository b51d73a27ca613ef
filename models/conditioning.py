"""What rows are conditioned on, put together for one forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from models.errors import MixedConditioning
from models.reuse.rows import Conditioning


def stack(parts: Sequence[Conditioning]) -> Conditioning:
    """The conditioning of several rows as one batch of [rows, ...] tensors.

    Raises `MixedConditioning` where some rows have what others have not: it must be a default or an error, and a row's
    family is the one to say which.
    """
    names = parts[0].keys()
    for part in parts[1:]:
        if part.keys() != names:
            odd = ", ".join(sorted(part.keys() ^ names))
            raise MixedConditioning(f"only some rows of this forward are conditioned on {odd}")
    return {name: torch.cat([part[name] for part in parts]) for name in names}
