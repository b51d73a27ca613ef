"""The MACs of requests, counted on a thread of their own, so that neither checks nor answers stand behind counts."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from app.http.schemas.responses import UsageBody
from models.device import set_threads
from models.request import Run

Count = Future[UsageBody]
COUNT_SECONDS = 4.0
"""What an answer waits at most for the count of its MACs; then it goes without.

A size and plan is counted once, in about 0.2 s, mostly while its first request is computed; after that it is looked up.
"""


class Counting:
    """Counts one after another; what an answer waits for goes first."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "counting", initializer=set_threads, initargs=(1,))
        self._waiting: OrderedDict[Count, Callable[[], UsageBody]] = OrderedDict()
        self._lock = Lock()

    def close(self) -> None:
        """Let the thread go."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def begin(self, count: Callable[[], UsageBody]) -> Count:
        """Begin a count, behind those that were begun before."""
        counting: Count = Future()
        with self._lock:
            self._waiting[counting] = count
        self._thread.submit(self._next)
        return counting

    def _next(self) -> None:
        with self._lock:
            counting, count = self._waiting.popitem(last=False)
        if counting.set_running_or_notify_cancel():
            try:
                counting.set_result(count())
            except Exception as error:
                counting.set_exception(error)

    async def known(self, count: Count, run: Run, deadline: float) -> UsageBody:
        """What was counted; an answer waits for no other's count but the one that is being made."""
        left = deadline - asyncio.get_running_loop().time()
        if not count.done() and left > 0:
            with self._lock:
                if count in self._waiting:
                    self._waiting.move_to_end(count, last=False)
            await asyncio.wait({asyncio.wrap_future(count)}, timeout=min(COUNT_SECONDS, left))
        return count.result() if count.done() and not count.cancelled() else uncounted(run)


def uncounted(run: Run) -> UsageBody:
    """What is known of a run's cost without counting."""
    counted = {"steps": len(run.steps), "evaluations": run.evaluations, "rows": run.num_rows}
    return UsageBody(**counted, macs=None, macs_unaccelerated=None)
