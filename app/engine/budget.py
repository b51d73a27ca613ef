"""How much the images that run may remember between steps: who may start, by what each is known to need at most."""

from __future__ import annotations


class Budget:
    """Bytes of features set aside for started images.

    An image that needs more than there is waits until nobody holds anything, and whoever needs something behind it
    waits too, so that it comes to its turn.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.reserved = 0

    def admission(self) -> Admission:
        """Who may start in one tick."""
        return Admission(max(0, self._limit - self.reserved), empty=self.reserved == 0)


class Admission:
    """Lets images start while their needs fit; to be asked in the order in which they came."""

    def __init__(self, room: int, *, empty: bool) -> None:
        self._room = room
        self._empty = empty
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
