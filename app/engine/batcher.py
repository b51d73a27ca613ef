"""Decides which images form the next tick: plain data in, a list out. No torch, no asyncio, no clock."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from heapq import merge
from itertools import count, islice
from typing import Any, Generic, Protocol, TypeVar

G = TypeVar("G", bound=Hashable, covariant=True)
H = TypeVar("H", bound=Hashable)


class Item(Protocol[G]):
    """What the batcher needs to know of one image's denoising."""

    @property
    def group(self) -> G:
        """Equal for items that can share a forward."""

    @property
    def num_rows(self) -> int:
        """Rows of the coming step."""


T = TypeVar("T", bound=Item[Any])

LOOKAHEAD = 256
"""How many waiting items of a group a tick looks at, so that its choice costs the same however long the line is."""


class Line(Generic[T]):
    """The items of one group by arrival; those that have begun are always seen, of the others the oldest."""

    def __init__(self) -> None:
        self.begun: dict[T, int] = {}
        self.waiting: dict[T, int] = {}

    def __len__(self) -> int:
        return len(self.begun) + len(self.waiting)

    def seen(self) -> Iterator[T]:
        """Oldest first."""
        waiting = islice(self.waiting.items(), LOOKAHEAD)
        return (item for item, _ in merge(self.begun.items(), waiting, key=lambda pair: pair[1]))


class Batcher(Generic[T, H]):
    """Groups take turns; within a group the oldest go first, as many as fit under the group's cap of rows.

    An item whose rows do not fit is passed over for smaller ones behind it. It cannot starve: what is older than it
    finishes, and then it is first.
    """

    def __init__(self, max_rows: Callable[[H], int]) -> None:
        """`max_rows(group)`: the cap; asked anew for every tick."""
        self._max_rows = max_rows
        self._lines: OrderedDict[H, Line[T]] = OrderedDict()
        self._arrivals = count()

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def add(self, item: T) -> None:
        """Put an item at the end of its group's line."""
        self._lines.setdefault(item.group, Line()).waiting[item] = next(self._arrivals)

    def begin(self, item: T) -> None:
        """Note that an item holds memory now: it goes on, however many that may not start stand before it."""
        line = self._lines[item.group]
        begun = {**line.begun, item: line.waiting.pop(item)}
        line.begun = dict(sorted(begun.items(), key=lambda pair: pair[1]))

    def discard(self, item: T) -> None:
        """Take an item out, wherever it is; nothing happens where it is not in."""
        line = self._lines.get(item.group)
        if line is None:
            return
        line.begun.pop(item, None)
        line.waiting.pop(item, None)
        if not line:
            del self._lines[item.group]

    def next(self, admit: Callable[[T], bool] = lambda _: True) -> list[T]:
        """The next tick: items of one group, which then goes to the end of the turn. Empty where nothing may be done.

        `admit` says of an item that has not begun whether it may; asked oldest first, of those whose rows fit.
        """
        for group in list(self._lines):
            tick = self._take(group, admit)
            if tick:
                self._lines.move_to_end(group)
                return tick
        return []

    def _take(self, group: H, admit: Callable[[T], bool]) -> list[T]:
        tick: list[T] = []
        room, line = self._max_rows(group), self._lines[group]
        for item in line.seen():
            if room <= 0:
                break
            rows = item.num_rows
            if (rows <= room or not tick) and (item in line.begun or admit(item)):
                tick.append(item)
                room -= rows
        return tick
