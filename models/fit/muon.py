"""Muon for the matrices of a network, AdamW for the rest.

Muon (Jordan et al., 2024) steps along the orthogonalised momentum of a matrix. Convolution kernels take part as
matrices [out, in * height * width] that share the kernel's storage.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

_OUTER = ("conv_in", "conv_out", "pos_embed", "proj_out", "time_embedding", "adaln_single", "caption_projection")


class MatrixMuon(Muon):
    """torch's Muon over parameters of two or more dimensions."""

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, weight_decay: float) -> None:
        self._kernels = list(parameters)
        self._matrices = [nn.Parameter(kernel.data.view(len(kernel), -1)) for kernel in self._kernels]
        super().__init__(self._matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for kernel, matrix in zip(self._kernels, self._matrices, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.view(len(kernel), -1)
        return super().step(closure)  # type: ignore[no-untyped-call]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for kernel in self._kernels:
            kernel.grad = None


def split_optimizers(network: nn.Module, lr: float, weight_decay: float = 0.01) -> list[Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, first and last layers, biases and norms."""
    named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    hidden = [p for name, p in named if p.ndim >= 2 and not name.startswith(_OUTER) and "table" not in name]
    chosen = {id(parameter) for parameter in hidden}
    rest = [parameter for _, parameter in named if id(parameter) not in chosen]
    return [MatrixMuon(hidden, lr, weight_decay), AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)]
