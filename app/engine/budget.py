"""How much the images that run may remember between steps: who may start, from what images like them needed before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

KINDS = 1024
"""Kinds of image whose need is remembered."""


class Budget:
    """Bytes of features set aside for started images. The most that an image of a kind ever held is what one needs.

    A kind that is new is taken to need nothing until it is seen. One that needs more than there is waits until nobody
    holds anything, and whoever needs something behind it waits too, so that it comes to its turn.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._needs: OrderedDict[Hashable, int] = OrderedDict()
        self.reserved = 0

    def need(self, kind: Hashable) -> int:
        """Bytes that an image of this kind will hold at most, as far as is known."""
        return self._needs.get(kind, 0)

    def observe(self, kind: Hashable, size: int) -> None:
        """Learn that an image of this kind holds `size` bytes."""
        if size > self.need(kind):
            self._needs[kind] = size
        if kind in self._needs:
            self._needs.move_to_end(kind)
        while len(self._needs) > KINDS:
            self._needs.popitem(last=False)

    def door(self) -> Door:
        """Who may start in one tick."""
        return Door(self, max(0, self._limit - self.reserved))


class Door:
    """Lets images start while their needs fit; to be asked in the order in which they came."""

    def __init__(self, budget: Budget, room: int) -> None:
        self._budget = budget
        self._room = room
        self._empty = budget.reserved == 0
        self._closed = False

    def admit(self, need: int) -> bool:
        """Whether one that needs this many bytes may start now."""
        if need == 0:
            return True
        if self._closed or (need > self._room and not self._empty):
            self._closed = True
            return False
        self._room = max(0, self._room - need)
        self._empty = False
        return True
