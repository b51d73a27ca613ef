"""Counts the operators that a piece of work dispatches: on a GPU each would be a launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        return func(*args, **(kwargs or {}))


def operators(work: Callable[[], object]) -> int:
    """How many operators `work` dispatches."""
    count = _Count()  # type: ignore[no-untyped-call]
    with count:
        work()
    return count.operators
