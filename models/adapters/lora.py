"""Adapters as tensors that travel with the rows: nothing is injected into the model, whose weights stay as they are."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from models.fingerprint import fingerprint
from models.spec import AdapterInfo

JOINT_TARGETS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Projections of the text tokens where they attend together with the image's."""
FUSED_TARGETS = ("to_qkv_mlp_proj", "to_out")
"""Of an attention beside its MLP, with one projection in and one out for both."""
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
ALL_TARGETS = (*TARGETS, *JOINT_TARGETS, *FUSED_TARGETS)
WEIGHT_NAME = "pytorch_lora_weights.safetensors"

Source = Literal["hidden", "context", "core", "context core"]
"""What a projection reads: an attention's input, what it attends to where that is another tensor, or its core; and of
text tokens that attend together with the image's, their part of the core."""


@dataclass(frozen=True, eq=False, slots=True)
class Term:
    """What an adapter adds to projections that read the same: one matmul serves them all.

    `down` [ranks, in] has theirs one above the other, as many rows each as `ranks` says; `ups` has [rank, out] of each
    by its name, with alpha / rank multiplied in.
    """

    down: Tensor
    ranks: Mapping[str, int]
    ups: Mapping[str, Tensor]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All it holds."""
        return (self.down, *self.ups.values())

    def to(self, device: torch.device | str) -> Term:
        """The same term on a device."""
        return Term(self.down.to(device), self.ranks, {name: up.to(device) for name, up in self.ups.items()})


Terms = Mapping[tuple[str, Source], Term]
"""By attention path and what is read."""


@dataclass(frozen=True, eq=False)
class Lora:
    """A loaded adapter. Rows that run under it carry a reference; the base weights are untouched."""

    info: AdapterInfo
    terms: Terms
    layers: Mapping[str, Term] = field(default_factory=dict)
    """By path, what it adds to other layers of the network: a single up named "", a kernel [rank, in, h, w] as down."""
    text: Mapping[str, Mapping[str, Term]] = field(default_factory=dict)
    """The same by text encoder."""

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All it holds, in an order that is always the same."""
        for key in sorted(self.terms):
            yield from ((f"{key} {i}", t) for i, t in enumerate(self.terms[key].tensors))
        for part, layers in sorted({"": self.layers, **self.text}.items()):
            for path in sorted(layers):
                yield from ((f"{part} {path} {i}", t) for i, t in enumerate(layers[path].tensors))

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors on the device."""
        return sum(t.nbytes for _, t in self.named_tensors())

    @cached_property
    def shapes(self) -> Hashable:
        """Equal for adapters that cost the same."""
        return hash(tuple((name, tuple(t.shape)) for name, t in self.named_tensors()))

    @cached_property
    def digest(self) -> str:
        """Tells its weights from another's."""
        return fingerprint(self.named_tensors())


@dataclass(frozen=True, eq=False, slots=True)
class Applied:
    """An adapter at the scale at which a trajectory runs under it; `factor` [1] is the scale on the device."""

    lora: Lora
    scale: float
    factor: Tensor = field(repr=False)

    @classmethod
    def of(cls, lora: Lora, scale: float, device: torch.device | str, dtype: torch.dtype) -> Applied:
        """Uploads the scale, once for a run."""
        return cls(lora, scale, torch.full((1,), scale, device=device, dtype=dtype))

    def same(self, other: Applied) -> bool:
        """Whether two rows' are one."""
        return self.lora is other.lora and self.scale == other.scale


def meta_lora(lora: Lora) -> Lora:
    """The same adapter without storage, for counting MACs; it keeps nothing of the other alive."""
    layers = {path: term.to("meta") for path, term in lora.layers.items()}
    return Lora(replace(lora.info), {key: term.to("meta") for key, term in lora.terms.items()}, layers)
