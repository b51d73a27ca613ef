"""Modules as the rows of one call run them: views of diffusers' own, with adapters' terms behind their layers.

A view shares every parameter and every untouched module with what it is of, which stays as it is: the module is copied
as an object, not its tensors, down to the layers that an adapter changes. The rows come in as an argument, so nothing
is hooked, swapped or written anywhere; diffusers' forward runs on the view, also where it hides a layer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from models.adapters.lora import Lora, Term
from models.adapters.low_rank import add_convolution, add_terms
from models.reuse.rows import Row, Segment, segments

Layers = Mapping[str, Term]
Pick = Callable[[Lora], Layers]
"""Which layers of an adapter are meant, by their paths: those of the network, or of one text encoder."""


class Adapted(nn.Module):
    """A linear layer or a convolution, and what adapters add for the rows [start, stop) of each part."""

    def __init__(self, base: nn.Module, path: str, parts: Sequence[Segment], pick: Pick) -> None:
        super().__init__()
        self.base = base
        self._terms = [
            (part, [[(pick(one.lora)[path], one) for one in g if path in pick(one.lora)] for g in part.groups])
            for part in parts
        ]

    def __getattr__(self, name: str) -> Any:
        """What diffusers asks of the layer itself: its weight's type, its channels."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """What the layer gives, with the terms of x [rows, ...] added."""
        out: Tensor = self.base(x, *rest)
        for part, groups in self._terms:
            if isinstance(self.base, nn.Conv2d):
                add_convolution(part.of(out), part.of(x), groups, self.base)
            else:
                add_terms({"": part.of(out)}, part.of(x), groups)
        return out


def network_layers(lora: Lora) -> Layers:
    """Those of the network beside its attentions' projections, which these add themselves."""
    return lora.layers


def bound(module: nn.Module, path: str, rows: Sequence[Row]) -> Any:
    """A module of the network, by its path, for these rows; itself where no adapter changes anything in it."""
    if not any(one.lora.layers for row in rows for one in row.adapters):
        return module
    return bound_parts(module, path, segments(rows), network_layers)


def bound_parts(module: nn.Module, path: str, parts: Sequence[Segment], pick: Pick, whole: bool = False) -> Any:
    """The same for parts of a batch; `whole`: a view of every module in it, for those that look at their own."""
    loras = {one.lora for part in parts for group in part.groups for one in group}
    inside = f"{path}." if path else ""
    targets = {target for lora in loras for target in pick(lora) if target == path or target.startswith(inside)}
    if not targets:
        return module
    return _view(module, path, targets, parts, pick, whole)


def _view(
    module: nn.Module, path: str, targets: Iterable[str], parts: Sequence[Segment], pick: Pick, whole: bool
) -> nn.Module:
    if path in targets:
        return Adapted(module, path, parts, pick)
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    modules: dict[str, nn.Module | None] = dict(module._modules)
    for name, child in modules.items():
        under = f"{path}.{name}" if path else name
        below = [target for target in targets if target == under or target.startswith(f"{under}.")]
        if child is not None and (below or whole):
            modules[name] = _view(child, under, below, parts, pick, whole)
    copied.__dict__["_modules"] = modules
    copied.__dict__["_compiled_call_impl"] = None  # what differs by row stays out of the graphs
    if whole:
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            copied.__dict__[hooks] = OrderedDict(module.__dict__[hooks])
    return copied
