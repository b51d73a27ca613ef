"""How much of a group the device does at once: less where memory ended, and bit by bit more again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from app.engine.job import Group

PATIENCE = 16
"""Good ticks at a lowered cap before it grows."""
MOST_GROUPS = 256
"""Groups whose lowered caps are kept; their sizes are a client's choice."""


@dataclass
class _Lowered:
    cap: int
    good: int = 0


class Caps:
    """Rows a tick, or pictures a chunk, by group.

    The rule: where memory ends, the cap becomes half of what was tried; after 16 good ticks that filled it, it grows by
    a quarter and at least by one, up to the most.
    """

    def __init__(self, most: Callable[[Group], int]) -> None:
        """`most(group)`: the cap of a group for which memory never ended."""
        self._most = most
        self._lowered: OrderedDict[Group, _Lowered] = OrderedDict()

    def __call__(self, group: Group) -> int:
        """The cap now."""
        lowered = self._lowered.get(group)
        return self._most(group) if lowered is None else lowered.cap

    def fell(self, group: Group, tried: int) -> None:
        """Note that there was no memory for so many."""
        self._lowered.pop(group, None)
        self._lowered[group] = _Lowered(max(1, tried // 2))
        if len(self._lowered) > MOST_GROUPS:
            self._lowered.popitem(last=False)

    def held(self, group: Group, done: int, each: int = 1) -> None:
        """Note that so many went well. The cap was filled where no other image of `each` would have fitted."""
        lowered = self._lowered.get(group)
        if lowered is None or done + each <= lowered.cap:
            return
        lowered.good += 1
        if lowered.good < PATIENCE:
            return
        grown = lowered.cap + max(1, lowered.cap // 4)
        if grown >= self._most(group):
            del self._lowered[group]
        else:
            self._lowered[group] = _Lowered(grown)
