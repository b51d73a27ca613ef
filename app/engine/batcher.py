"""Decides which images form the next tick: plain data in, a list out. No torch, no asyncio, no clock.

The rule: *the share that was served least goes first, and in a share the request that would be done first if all of
the share's were served alike.* A share is a client, or a class of its work.

So clients get equal numbers of rows, whatever each of them asks for; a small request passes large ones that came
before it; and a large one is passed only until as much was done as it has to do for each request beside it, so nobody
starves. Requests of equal size go in the order in which they came. The first of all names the group, and all in it that
fit fill the tick. (Processor sharing's order of finishing, as in fair queueing: Demers, Keshav and Shenker 1989.)
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace, merge
from itertools import count, islice
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

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
    def work(self) -> float:
        """Rows that its whole request has still to do when it is added."""

    @property
    def request(self) -> Hashable:
        """Equal for the images of one request."""

    @property
    def share(self) -> Hashable:
        """Who is served with it: all of one share together get as many rows as all of another of the same weight."""

    @property
    def weight(self) -> float:
        """How many rows of another share's one of its own counts for: a share of weight 2 gets twice the rows."""


T = TypeVar("T", bound=Item[Any])
Turn = tuple[float, float, int, Hashable, T]
"""When an item is to be served: its share's rows, when it is due, when it came; and the share and the item."""

LOOKAHEAD = 256
"""How many waiting items of a share in a group a tick looks at, and how many of a group it asks to start."""
AHEAD = 2
"""Nobody begins where as many requests have begun as so many ticks have rows: what is passed holds memory meanwhile.

Requests are counted and not their rows: one of many images may fill several ticks, and would shut others out.
"""


class Entry(NamedTuple):
    """An item's place in its share: due when each request of the share will have been served so many rows."""

    due: float
    arrival: int
    item: Any


@dataclass
class Line:
    """The items of one share in one group by their places: those that have begun, and those that have not."""

    begun: list[Entry] = field(default_factory=list)
    waiting: list[Entry] = field(default_factory=list)

    def first(self) -> Entry:
        """The first of all."""
        return min((entries[0] for entries in (self.begun, self.waiting) if entries), key=_place)

    def seen(self) -> Iterator[Entry]:
        """All that have begun and the first of the others, in order."""
        return merge(self.begun, islice(self.waiting, LOOKAHEAD), key=_place)

    def remove(self, entry: Entry) -> None:
        """Take it out."""
        for entries in (self.begun, self.waiting):
            at = bisect_left(entries, _place(entry), key=_place)
            if at < len(entries) and entries[at].item is entry.item:
                del entries[at]


def _place(entry: Entry) -> tuple[float, int]:
    return entry.due, entry.arrival


@dataclass
class Account:
    """What a share was served.

    `served` are its rows by its weight, `each` the rows that each of its requests would have by now if all were served
    alike, and `requests` how many images each has here.
    """

    served: float
    each: float = 0.0
    requests: dict[Hashable, int] = field(default_factory=dict)


class Batcher(Generic[T, H]):
    """Who takes part in the next tick, by the rule above, as many as fit under the group's cap of rows.

    An item whose rows do not fit is passed over for others; its share is not served, so that it comes first soon.
    A share that comes new or again begins where the least served one stands: what it did not use before is not kept
    for it, and what it had too much is forgotten.
    """

    def __init__(self, max_rows: Callable[[H], int]) -> None:
        """`max_rows(group)`: the cap; asked anew for every tick."""
        self._max_rows = max_rows
        self._groups: dict[H, dict[Hashable, Line]] = {}
        self._entries: dict[T, tuple[H, Hashable, Entry]] = {}
        self._accounts: dict[Hashable, Account] = {}
        self._arrivals = count()
        self._served = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, item: T) -> None:
        """Give an item its place."""
        account = self._accounts.setdefault(item.share, Account(self._served))
        account.requests[item.request] = account.requests.get(item.request, 0) + 1
        entry = Entry(account.each + item.work, next(self._arrivals), item)
        self._entries[item] = item.group, item.share, entry
        insort(self._line(item).waiting, entry, key=_place)

    def begin(self, item: T) -> None:
        """Note that an item holds memory now: it goes on, however many that may not start stand before it."""
        entry, line = self._entries[item][2], self._line(item)
        line.remove(entry)
        insort(line.begun, entry, key=_place)

    def discard(self, item: T) -> None:
        """Take an item out, wherever it is; nothing happens where it is not in."""
        if item not in self._entries:
            return
        line = self._line(item)
        group, share, entry = self._entries.pop(item)
        line.remove(entry)
        if not (line.begun or line.waiting):
            del self._groups[group][share]
            if not self._groups[group]:
                del self._groups[group]
        requests = self._accounts[share].requests
        requests[item.request] -= 1
        if not requests[item.request]:
            del requests[item.request]
        if not requests:
            del self._accounts[share]

    def next(self, admit: Callable[[T], bool] = lambda _: True) -> list[T]:
        """The next tick: items of one group. Empty where nothing may be done.

        `admit` says of an item that has not begun whether it may; asked in the order of the rule, of those whose rows
        fit. Whoever is in the tick counts as served.
        """
        firsts = {group: self._firsts(group) for group in self._groups}
        for group in sorted(firsts, key=lambda group: firsts[group][0][:3]):
            tick = self._take(group, firsts[group], admit)
            if tick:
                return tick
        return []

    def _line(self, item: T) -> Line:
        group, share, _ = self._entries[item]
        return self._groups.setdefault(group, {}).setdefault(share, Line())

    def _firsts(self, group: H) -> list[Turn[T]]:
        """The first item of every share in a group, as a heap."""
        turns = [self._turn(share, line.first()) for share, line in self._groups[group].items()]
        heapify(turns)
        return turns

    def _turn(self, share: Hashable, entry: Entry) -> Turn[T]:
        """When an item is to be served: smaller is sooner, and no two arrivals are equal."""
        return self._accounts[share].served, entry.due, entry.arrival, share, entry.item

    def _take(self, group: H, turns: list[Turn[T]], admit: Callable[[T], bool]) -> list[T]:
        tick: list[T] = []
        lines, room = self._groups[group], self._max_rows(group)
        begun = {entry.item for line in lines.values() for entry in line.begun}
        running = {item.request for item in begun}
        most = AHEAD * room
        asked = 0
        queues: dict[Hashable, Iterator[Entry]] = {}
        while turns and room > 0:
            *_, share, item = turns[0]
            rows = item.num_rows
            if rows <= room or not tick:
                fresh = item not in begun
                if fresh:
                    asked += 1
                if not fresh or (len(running) < most and asked <= LOOKAHEAD and admit(item)):
                    tick.append(item)
                    room -= rows
                    running.add(item.request)
                    account = self._accounts[share]
                    if len(tick) == 1:
                        self._served = max(self._served, account.served)
                    account.served += rows / item.weight
                    account.each += rows / len(account.requests)
            if share not in queues:
                queues[share] = lines[share].seen()
                next(queues[share])  # which is the item at hand
            if (entry := next(queues[share], None)) is not None:
                heapreplace(turns, self._turn(share, entry))
            else:
                heappop(turns)
        return tick
