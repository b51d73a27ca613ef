"""Decides which images form the next tick: plain data in, a list out. No torch, no asyncio, no clock."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
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

    @property
    def started(self) -> bool:
        """Whether it already holds memory on the device."""


T = TypeVar("T", bound=Item[Any])


class Batcher(Generic[T, H]):
    """Groups take turns; within a group the oldest go first, as many as fit under the group's cap of rows.

    An item whose rows do not fit is passed over for smaller ones behind it. It cannot starve: what is older than it
    finishes, and then it is first.
    """

    def __init__(self, max_rows: Callable[[H], int]) -> None:
        """`max_rows(group)`: the cap; asked anew for every tick."""
        self._max_rows = max_rows
        self._groups: OrderedDict[H, OrderedDict[T, None]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(items) for items in self._groups.values())

    def __iter__(self) -> Iterator[T]:
        return (item for items in self._groups.values() for item in items)

    def add(self, item: T) -> None:
        """Put an item at the end of its group's line."""
        self._groups.setdefault(item.group, OrderedDict())[item] = None

    def discard(self, item: T) -> None:
        """Take an item out, wherever it is; nothing happens where it is not in."""
        items = self._groups.get(item.group)
        if items is None:
            return
        items.pop(item, None)
        if not items:
            del self._groups[item.group]

    def next(self, admit: Callable[[T], bool] = lambda _: True) -> list[T]:
        """The next tick: items of one group, which then goes to the end of the turn. Empty where nothing may be done.

        `admit` says of an item that has not started whether it may; asked oldest first, of those whose rows fit.
        """
        for group in list(self._groups):
            tick = self._take(group, admit)
            if tick:
                self._groups.move_to_end(group)
                return tick
        return []

    def _take(self, group: H, admit: Callable[[T], bool]) -> list[T]:
        tick: list[T] = []
        room = self._max_rows(group)
        for item in self._groups[group]:
            if room <= 0:
                break
            if (item.num_rows <= room or not tick) and (item.started or admit(item)):
                tick.append(item)
                room -= item.num_rows
        return tick
