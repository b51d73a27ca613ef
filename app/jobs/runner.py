"""Runs the jobs of the store in the same engine as live requests, behind them; on the loop, the store off it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from app.errors import (
    EngineDead,
    QueueFull,
    ServiceError,
    StoreFull,
    StoreUnavailable,
    Unavailable,
)
from app.jobs.execution import Execution, Running
from app.jobs.leases import Claimed
from app.jobs.queue import Jobs
from app.jobs.retention import Retention
from app.logs import SERVER

if TYPE_CHECKING:
    from app.http.service import Service

LOOK_SECONDS = 0.5
"""How often a server looks for work that others accepted."""
BEAT_SECONDS = 2.0
"""How often leases are renewed and progress is noted, at least."""
SWEEP_SECONDS = 10.0
RETRY_SECONDS = 2.0
"""How long to wait for a store that is full or cannot be reached."""
STOP_SECONDS = 20.0


@dataclass(eq=False)
class Runner:
    """Claims jobs while there is room for them, and sees each to its end."""

    jobs: Jobs
    service: Service
    retention: Retention
    chores: Sequence[Callable[[], Awaitable[None]]] = ()
    execution: Execution = field(init=False)
    running: dict[str, Running] = field(default_factory=dict)
    stopping: bool = False
    _woken: asyncio.Event = field(default_factory=asyncio.Event)
    _watchers: dict[str, set[asyncio.Event]] = field(default_factory=dict)
    _loops: list[asyncio.Task[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.execution = Execution(self.jobs, self.service)

    # From the routes

    def wake(self) -> None:
        """There is something to claim."""
        self._woken.set()

    def progress(self, job_id: str) -> tuple[int, int] | None:
        """(step, total) of a job that this server runs."""
        running = self.running.get(job_id)
        return None if running is None or not running.total else (running.step, running.total)

    def stop_job(self, job_id: str) -> None:
        """A running job was cancelled; where it runs here it need not wait to be told by the store."""
        running = self.running.get(job_id)
        if running is not None and running.task is not None and not running.ended:
            running.cancelled = True
            if running.begun:  # a task that is cancelled before its first step would never tell its end
                running.task.cancel()

    async def changed(self, job_id: str, seconds: float) -> None:
        """Wait until something happens to a job here, or so long."""
        event = asyncio.Event()
        self._watchers.setdefault(job_id, set()).add(event)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await event.wait()
        finally:
            self._watchers[job_id].discard(event)
            if not self._watchers[job_id]:
                del self._watchers[job_id]

    def _tell(self, job_id: str) -> None:
        for event in self._watchers.get(job_id, ()):
            event.set()

    # Life

    async def start(self) -> None:
        """Take up what a process left behind, then go on until `stop`."""
        store = self.jobs.store
        if not store.shared:
            recovered = await store.call(self.jobs.leases.recover)
            self.service.metrics.recovered.inc(recovered)
            swept = await store.call(store.sweep)
            if recovered or swept:
                SERVER.info("the store: %d jobs run again, %d halves of files removed", recovered, swept)
        await store.call(store.count_bytes)
        loops = [(self._beat, self._beat_seconds), (self._claim, LOOK_SECONDS), (self._sweep, SWEEP_SECONDS)]
        for work, seconds in [*loops, *((chore, LOOK_SECONDS) for chore in self.chores)]:
            self._loops.append(asyncio.create_task(self._again(work, seconds)))

    async def stop(self) -> None:
        """Claim no more, see what runs to its end (the engine ends it), and give back what has none."""
        self.stopping = True
        beat, others = self._loops[:1], self._loops[1:]  # what still runs keeps its lease
        await _cancelled(others)
        tasks = [running.task for running in self.running.values() if running.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_SECONDS)
            await _cancelled(tasks)
        await _cancelled(beat)

    async def _again(self, work: Callable[[], Awaitable[None]], seconds: float) -> None:
        """Do something over and over; a store that fails is tried again later, and said so once."""
        failing = False
        while True:
            try:
                await work()
                failing = False
            except Exception as error:
                if not failing:
                    SERVER.error("the store: %s", error, exc_info=None if isinstance(error, ServiceError) else error)
                failing = True
                await asyncio.sleep(RETRY_SECONDS)
            self._woken.clear()
            if work == self._claim:
                with suppress(TimeoutError):  # `wait_for` of Python 3.11 may lose the cancellation that ends this loop
                    async with asyncio.timeout(seconds):
                        await self._woken.wait()
            else:
                await asyncio.sleep(seconds)

    @property
    def _beat_seconds(self) -> float:
        return min(BEAT_SECONDS, self.jobs.leases.lease / 5)

    # The loops

    @property
    def room(self) -> int:
        """How many more jobs may go to the engine: fewer, the more live requests there are; one always."""
        engine, asked = self.service.engine, self.service.settings.jobs_in_flight
        if not engine.ready or self.stopping or any(running.suspect for running in self.running.values()):
            return 0
        most = max(engine.max_rows.values(), default=1) if asked == "auto" else asked
        live = max(0, engine.jobs - len(self.running))
        return max(1, most - live) - len(self.running)

    async def _claim(self) -> None:
        while (room := self.room) > 0:
            alone = not self.running
            claimed, struck, recovered = await self.jobs.store.call(self.jobs.leases.claim, room, alone)
            self.service.metrics.recovered.inc(recovered)
            for row in struck:
                SERVER.error("job %s is failed: the process ended three times while it ran", row["id"])
                self._tell(row["id"])
            for job in claimed:
                self._begin(job)
            if not (claimed or struck):
                return

    async def _beat(self) -> None:
        progress = {job_id: (running.step, running.total) for job_id, running in self.running.items()}
        if progress:
            for job_id in await self.jobs.store.call(self.jobs.leases.renew, progress):
                self.stop_job(job_id)

    async def _sweep(self) -> None:
        store = self.jobs.store
        await store.call(self.retention.apply, store)
        for status, count in (await store.call(self.jobs.counts)).items():
            self.service.metrics.jobs.labels(status).set(count)

    # One job

    def _begin(self, claimed: Claimed) -> None:
        job_id = claimed.row["id"]
        running = self.running[job_id] = Running(claimed.row, claimed.suspect)
        running.task = asyncio.create_task(self._see_through(running))

    async def _see_through(self, running: Running) -> None:
        """Run a job, and write down how it ended."""
        job_id = running.row["id"]
        running.begun = True
        self._tell(job_id)
        try:
            try:
                if running.cancelled:
                    raise asyncio.CancelledError
                ended = await self.execution.run(running, lambda: self._tell(job_id))
            except asyncio.CancelledError:
                ended = partial(self.jobs.leases.stopped, job_id) if running.cancelled else self._give_back(job_id)
            except EngineDead:  # the process ends now, and this job may be why
                ended = None
            except (Unavailable, QueueFull) as refused:
                if not self.stopping:
                    await asyncio.sleep(min(RETRY_SECONDS, refused.retry_after or RETRY_SECONDS))
                ended = self._give_back(job_id)
            running.ended = True
            if ended is not None:
                await self._write(ended)
        finally:
            self.running.pop(job_id, None)
            self._tell(job_id)
            self.wake()

    def _give_back(self, job_id: str) -> Callable[[], object]:
        return partial(self.jobs.leases.release, [job_id])

    async def _write(self, write: Callable[[], object]) -> None:
        """Write how a job ended. A store that is full or away is waited for: the job keeps its place until then."""
        waiting = False
        while True:
            try:
                await self.jobs.store.call(write)
                return
            except (StoreFull, StoreUnavailable) as error:
                if self.stopping:
                    return  # it runs again after the next start
                if not waiting:
                    SERVER.error("a finished job waits for the store: %s", error)
                waiting = True
                await asyncio.sleep(RETRY_SECONDS)


async def _cancelled(tasks: Sequence[asyncio.Task[None]]) -> None:
    """End them, and see that they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
