"""How long requests wait, what they keep meanwhile, in bytes, and what is decoded at once, in pixels."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from app.errors import DeadlineExceeded, QueueFull


@asynccontextmanager
async def in_time(deadline: float) -> AsyncIterator[None]:
    """Give what is done in the block up at a moment on the loop's clock. Raises `DeadlineExceeded`."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed before the images were done", param="timeout_seconds") from None


REQUEST_BYTES = 64 * 2**10
"""What an accepted request keeps beside its picture: its checked run, its conditions, its latents at usual sizes."""


class Waiting:
    """The bytes of all requests that are not answered yet. Used on the loop only."""

    def __init__(self, most: int, retry_after: Callable[[], int]) -> None:
        """`retry_after()`: seconds after which one that is refused may come again."""
        self._most = most
        self._retry_after = retry_after
        self.bytes = 0

    def hold(self, size: int) -> Held:
        """Room for so many bytes more. Raises `QueueFull`."""
        held = Held(self)
        held.resize(size)
        return held

    def _take(self, more: int) -> None:
        if more > 0 and self.bytes + more > self._most:
            reason = f"{self.bytes} bytes of requests are waiting, and {more} more would be over {self._most}"
            raise QueueFull(reason, retry_after=self._retry_after())
        self.bytes += more


class Held:
    """One request's room."""

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting
        self.bytes = 0

    def resize(self, size: int) -> None:
        """Take more room, or give some back. Raises `QueueFull` where there is no more."""
        self._waiting._take(size - self.bytes)
        self.bytes = size

    def free(self) -> None:
        """Give all of it back; may be asked twice."""
        self.resize(0)

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *error: object) -> None:
        self.free()


class Pixels:
    """Lets pictures be decoded while their pixels, all together, are no more than `most`; in the order of arrival.

    One that is larger is decoded alone.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._turn = asyncio.Lock()
        self._freed = asyncio.Condition()
        self.used = 0

    @asynccontextmanager
    async def take(self, pixels: int) -> AsyncIterator[None]:
        """Wait for room, and have it for as long as the block lasts."""
        async with self._turn, self._freed:
            await self._freed.wait_for(lambda: self.used + pixels <= self._most or not self.used)
            self.used += pixels
        try:
            yield
        finally:
            self.used -= pixels
            async with self._freed:
                self._freed.notify_all()
