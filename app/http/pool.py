"""Threads for what is neither the loop's work nor the engine's: reading and writing pictures, checking runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from models.device import set_threads

T = TypeVar("T")
THREADS = 2


class Pool:
    """A few threads, each of which computes alone.

    With a second team of OpenMP threads in the process, GCC's runtime takes the cores for oversubscribed, puts waiting
    threads to sleep at once, and a step on the engine's thread takes twice as long.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "pool", initializer=set_threads, initargs=(1,))

    def close(self) -> None:
        """Let the threads go; what waits is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def submit(self, work: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        """Begin something off the loop."""
        return asyncio.get_running_loop().run_in_executor(self._threads, partial(work, *arguments))

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do something off the loop."""
        return await self.submit(work, *arguments)
