"""Work on the device that may fail without taking the engine with it, and that hurts nobody but who is at fault."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from models.device import out_of_memory, poisons

T = TypeVar("T")


def attempt(work: Callable[[], object]) -> Exception | None:
    """Do it, or return what it raised. The traceback's frames, which hold tensors, are let go of.

    An error after which the device can do nothing more is raised.
    """
    try:
        work()
    except Exception as error:
        if poisons(error):
            raise
        if not out_of_memory(error):
            return error
        return error.with_traceback(None)
    return None


def bisect(
    items: Sequence[T], work: Callable[[list[T]], object], undone: Callable[[list[T]], list[T]]
) -> Iterator[tuple[list[T], Exception | None]]:
    """Do work on all items together; where that fails, on halves, until each that fails is alone.

    Yields every part that was tried, with its error. `undone` says which of a part still have it to do, asked before
    each attempt, so that nothing is done twice. One item at fault among n costs 2 log2 n attempts more.
    """
    parts = deque([list(items)])
    while parts:
        part = undone(parts.popleft())
        if not part:
            continue
        error = attempt(partial(work, part))
        yield part, error
        if error is not None and len(part) > 1:
            error.__traceback__ = None
            left = undone(part)
            middle = (len(left) + 1) // 2
            parts.extendleft((left[middle:], left[:middle]))
