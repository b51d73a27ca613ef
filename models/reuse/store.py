"""Where remembered features live: pools of equal tensors with a slot for each, written and read many rows at a time.

A pool grows when it is full and is given back once nothing is in it. Slots are freed when an entry is forgotten, and
when the memory that holds them is dropped, however its trajectory ended.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.device import upload
from models.reuse.plans import Entry, Reading

SMALLEST_POOL = 4


class _Pool:
    """Tensors of one shape: `data` [capacity, *shape]. Any thread may free a slot; one thread at a time takes some."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.data = torch.empty(0, *shape, dtype=dtype, device=device)
        self.free: deque[int] = deque()

    @property
    def used(self) -> int:
        """Slots taken."""
        return len(self.data) - len(self.free)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return self.data[0:1].nbytes if len(self.data) else 0

    def reserve(self, count: int) -> None:
        """Have at least this many slots free. What is in the pool is copied where it has to grow."""
        if (missing := count - len(self.free)) <= 0:
            return
        capacity = max(2 * len(self.data), len(self.data) + missing, SMALLEST_POOL)
        grown = self.data.new_empty(capacity, *self.data.shape[1:])
        grown[: len(self.data)] = self.data
        self.free.extend(range(len(self.data), capacity))
        self.data = grown


@dataclass(eq=False)
class Memory:
    """What one row of one trajectory remembers: where its entries lie. Its slots are freed when it is dropped."""

    slots: dict[Entry, tuple[_Pool, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        weakref.finalize(self, _free, self.slots).atexit = False

    @property
    def nbytes(self) -> int:
        """Bytes of what is remembered."""
        return sum(pool.slot_bytes for pool, _ in self.slots.values())

    def forget(self, entries: Sequence[Entry]) -> None:
        """Free the slots of these entries."""
        for entry in entries:
            pool, slot = self.slots.pop(entry)
            pool.free.append(slot)

    def clear(self) -> None:
        """Free every slot."""
        _free(self.slots)


def _free(slots: dict[Entry, tuple[_Pool, int]]) -> None:
    while slots:
        _, (pool, slot) = slots.popitem()
        pool.free.append(slot)


class FeatureStore:
    """The pools of one backbone, by shape. Features are written and read by the thread that runs the network."""

    def __init__(self) -> None:
        self._pools: dict[tuple[tuple[int, ...], torch.dtype, torch.device], _Pool] = {}
        self.peak_bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the features remembered now."""
        return sum(pool.used * pool.slot_bytes for pool in self._pools.values())

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the pools, free slots included."""
        return sum(pool.data.nbytes for pool in self._pools.values())

    def write(self, entries: Sequence[tuple[Memory, Entry]], values: Tensor) -> None:
        """Remember values [entries, *shape], each as its entry; one that is there already is written over."""
        key = (tuple(values.shape[1:]), values.dtype, values.device)
        pool = self._pools.setdefault(key, _Pool(*key))
        pool.reserve(sum(entry not in memory.slots for memory, entry in entries))
        slots = []
        for memory, entry in entries:
            if entry not in memory.slots:
                memory.slots[entry] = (pool, pool.free.popleft())
            slots.append(memory.slots[entry][1])
        pool.data.index_copy_(0, upload(slots, values.device), values)
        self.peak_bytes = max(self.peak_bytes, self.nbytes)

    def read(self, readings: Sequence[tuple[Memory, Reading]]) -> Tensor:
        """The weighted sums [readings, *shape] of entries of one shape."""
        [pool] = {memory.slots[entry][0] for memory, reading in readings for entry in reading.entries}
        most = max(len(reading.entries) for _, reading in readings)
        slots, weights = [], []
        for memory, reading in readings:
            spare = most - len(reading.entries)
            own = [memory.slots[entry][1] for entry in reading.entries]
            slots += own + own[:1] * spare
            weights += [*reading.weights, *(0.0,) * spare]
        found = pool.data.index_select(0, upload(slots, pool.data.device))
        if most == 1 and all(weight == 1.0 for weight in weights):
            return found
        exact = torch.promote_types(found.dtype, torch.float32)
        factors = upload(weights, found.device, exact).view(len(readings), most)
        shaped = found.view(len(readings), most, -1).to(exact)
        summed = torch.einsum("re,ref->rf", factors, shaped)
        return summed.to(found.dtype).view(len(readings), *found.shape[1:])

    def trim(self) -> None:
        """Give empty pools back: sizes are a client's choice, so nothing is kept of those that went by."""
        for key, pool in list(self._pools.items()):
            if not pool.used:
                del self._pools[key]
