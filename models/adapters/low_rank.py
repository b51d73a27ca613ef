"""The arithmetic of adapters: low-rank terms added for many rows at once, each row under adapters of its own.

Where rows differ, their matrices are stacked and multiplied as one batch (as in Punica, arXiv:2310.18547), padded with
zeros to one rank: operators do not grow with the number of adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

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
