"""The MACs of requests, counted on a thread of their own, so that neither checks nor answers stand behind counts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from app.http.schemas.responses import UsageBody
from models.device import set_threads
from models.request import Run

Count = Future[UsageBody]
COUNT_SECONDS, FEW_COUNTS = 2.0, 128
"""What an answer waits at most for the count of its MACs, and how many may be to be made then.

A size and plan is counted once, in about 0.2 s, mostly while its first request is computed; after that it is looked up.
Where more than so many wait their answers have no MACs, and nobody waits.
"""


class Counting:
    """Counts one after another."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "counting", initializer=set_threads, initargs=(1,))
        self._counts: set[Count] = set()

    def close(self) -> None:
        """Let the thread go."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def begin(self, count: Callable[[], UsageBody]) -> Count:
        """Begin a count, behind those that were begun before."""
        counting = self._thread.submit(count)
        self._counts.add(counting)
        counting.add_done_callback(self._counts.discard)
        return counting

    async def known(self, count: Count, run: Run, deadline: float) -> UsageBody:
        """What was counted. Where few counts are to be made an answer waits a moment for its own, else not at all."""
        left = deadline - asyncio.get_running_loop().time()
        if not count.done() and len(self._counts) <= FEW_COUNTS and left > 0:
            await asyncio.wait({asyncio.wrap_future(count)}, timeout=min(COUNT_SECONDS, left))
        return count.result() if count.done() and not count.cancelled() else uncounted(run)


def uncounted(run: Run) -> UsageBody:
    """What is known of a run's cost without counting."""
    counted = {"steps": len(run.steps), "evaluations": run.evaluations, "rows": run.num_rows}
    return UsageBody(**counted, macs=None, macs_unaccelerated=None)
