"""The arithmetic of adapters: low-rank terms added for many rows at once, each row under adapters of its own.

Where rows differ, their matrices are stacked and multiplied as one batch (as in Punica, arXiv:2310.18547), padded with
zeros to one rank: operators do not grow with the number of adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.adapters.lora import Applied, Term

Group = Sequence[tuple[Term, Applied]]
"""The terms of neighbouring rows that are under the same adapters."""
LOOPED = 2
"""Groups up to which one after the other takes no more operators than all at once."""


def add_terms(outs: Mapping[str, Tensor], x: Tensor, groups: Sequence[Group]) -> None:
    """Add what adapters make of x [rows, ..., in] to outs [rows, ..., out] by projection, in place.

    The rows are cut evenly into groups, in their order.
    """
    unit = len(x) // len(groups)
    changed = [i for i, group in enumerate(groups) if group]
    if not changed:
        return
    if len(changed) <= LOOPED:
        for i in changed:
            rows = slice(i * unit, (i + 1) * unit)
            _add_alike({name: out[rows] for name, out in outs.items()}, x[rows], groups[i])
        return
    first, last = changed[0], changed[-1] + 1
    rows = slice(first * unit, last * unit)
    _add_stacked({name: out[rows] for name, out in outs.items()}, x[rows], groups[first:last])


def _add_alike(outs: Mapping[str, Tensor], x: Tensor, group: Group) -> None:
    """All rows under the same adapters: plain matmuls."""
    for term, applied in group:
        inner = F.linear(x, term.down).flatten(0, -2)  # [tokens, ranks]
        for (name, up), h in zip(term.ups.items(), inner.split_with_sizes(list(term.ranks.values()), 1), strict=True):
            out = outs[name].view(-1, up.shape[1])
            torch.addmm(out, h, up, alpha=applied.scale, out=out)  # not addmm_, which flop counters do not know


def _add_stacked(outs: Mapping[str, Tensor], x: Tensor, groups: Sequence[Group]) -> None:
    """A batch of matmuls with an entry for each group."""
    names = list(dict.fromkeys(name for group in groups for term, _ in group for name in term.ups))
    wide = {name: max(sum(term.ranks.get(name, 0) for term, _ in group) for group in groups) for name in names}
    alike = all(len(group) == 1 and dict(group[0][0].ranks) == wide for group in groups)
    count, total = len(groups), sum(wide.values())
    if alike:
        down = torch.cat([group[0][0].down for group in groups])
        factor = torch.cat([group[0][1].factor for group in groups]).view(count, 1, 1)
    else:
        down, factor = _padded_downs(x, groups, wide)
    inner = torch.bmm(x.reshape(count, -1, x.shape[-1]), down.view(count, total, -1).mT)  # [groups, tokens, ranks]
    if any(applied.scale != 1.0 for group in groups for _, applied in group):
        inner = inner * factor
    for name, h in zip(names, inner.split_with_sizes(list(wide.values()), 2), strict=True):
        out = outs[name].view(count, -1, outs[name].shape[-1])
        up = _stacked_ups(out, groups, name, wide[name])
        torch.baddbmm(out, h, up, out=out)


def _padded_downs(x: Tensor, groups: Sequence[Group], wide: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Downs [groups * ranks, in] with zeros where a group has less, and the scale [groups, 1, ranks] of each row."""
    zeros = x.new_zeros(max(wide.values()), x.shape[-1])
    none = zeros[0, :1]
    downs: list[Tensor] = []
    factors: list[Tensor] = []
    for group in groups:
        parts = [_by_name(term) for term, _ in group]
        for name, rank in wide.items():
            missing = rank
            for part, (_, applied) in zip(parts, group, strict=True):
                if name in part:
                    downs.append(part[name])
                    factors.append(applied.factor.expand(len(part[name])))
                    missing -= len(part[name])
            if missing:
                downs.append(zeros[:missing])
                factors.append(none.expand(missing))
    return torch.cat(downs), torch.cat(factors).view(len(groups), 1, -1)


def _by_name(term: Term) -> dict[str, Tensor]:
    return dict(zip(term.ranks, term.down.split_with_sizes(list(term.ranks.values())), strict=True))


def _stacked_ups(out: Tensor, groups: Sequence[Group], name: str, rank: int) -> Tensor:
    """[groups, rank, out], in the order of the downs, with zeros where a group has less."""
    ups: list[Tensor] = []
    for group in groups:
        mine = [term.ups[name] for term, _ in group if name in term.ups]
        ups += mine
        if missing := rank - sum(map(len, mine)):
            ups.append(out.new_zeros(missing, out.shape[-1]))
    return torch.cat(ups).view(len(groups), rank, -1)


def add_convolution(out: Tensor, x: Tensor, groups: Sequence[Group], base: nn.Conv2d) -> None:
    """Add what adapters make of x [rows, in, h, w] by convolutions like `base` to out [rows, out, h, w], in place."""
    options: dict[str, Any] = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation}
    unit = len(x) // len(groups)
    changed = [i for i, group in enumerate(groups) if group]
    if len(changed) <= LOOPED:
        for i in changed:
            rows = slice(i * unit, (i + 1) * unit)
            for term, applied in groups[i]:
                h = F.conv2d(x[rows], term.down, **options)
                out[rows].add_(F.conv2d(h, term.ups[""].t()[..., None, None]), alpha=applied.scale)
        return
    first, last = changed[0], changed[-1] + 1
    rows, some = slice(first * unit, last * unit), groups[first:last]
    rank = max(sum(term.ranks[""] for term, _ in group) for group in some)
    down, factor = _kernels(x, some, rank, base)
    # One convolution in groups: channels of unlike rows beside each other.
    spread = x[rows].reshape(len(some), unit, *x.shape[1:]).transpose(0, 1).flatten(1, 2)  # [unit, groups * in, h, w]
    h = F.conv2d(spread, down, groups=len(some), **options)
    size = h.shape[2:]
    h = (
        h.reshape(unit, len(some), rank, *size).transpose(0, 1).flatten(3) * factor[:, None, :, None]
    )  # [groups, unit, rank, h * w]
    ups = _stacked_ups(out.new_empty(0, out.shape[1]), some, "", rank).mT  # [groups, out, rank]
    out[rows].add_((ups[:, None] @ h).reshape(len(some) * unit, -1, *size))


def _kernels(x: Tensor, groups: Sequence[Group], rank: int, base: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Downs [groups * rank, in, h, w] with zeros where a group has less, and the scale [groups, rank] of each."""
    downs: list[Tensor] = []
    factors: list[Tensor] = []
    for group in groups:
        downs += [term.down for term, _ in group]
        factors += [applied.factor.expand(term.ranks[""]) for term, applied in group]
        if missing := rank - sum(term.ranks[""] for term, _ in group):
            downs.append(x.new_zeros(missing, base.in_channels, *base.kernel_size))
            factors.append(x.new_zeros(missing))
    return torch.cat(downs), torch.cat(factors).view(len(groups), rank)
