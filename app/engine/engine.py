"""The one thread that owns the device: takes jobs and departures in, lets the worker work, answers everyone."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from app.engine.job import Event, Failed, Job, Queued
from app.engine.machine import choose_threads
from app.engine.pace import Pace, retry_after
from app.engine.worker import Worker
from app.errors import Draining, EngineDead, Loading, QueueFull
from app.logs import SERVER
from app.metrics import Metrics
from app.settings import Settings
from models.backbone import Backbone
from models.device import give_back_freed_memory, set_threads, thread_count
from models.profiles.choice import Outlook

State = Literal["loading", "ready", "draining", "stopped", "dead"]
Loaded = tuple[Mapping[str, Backbone], dict[str, int]]
"""The backbones by name, and each one's cap of rows a tick, which the worker may change."""

RETRY_LOADING = 5
IDLE_SECONDS = 5.0
"""How long there is nothing to do before freed memory goes back to the system: what is kept makes ticks faster."""
PREDICTION_SECONDS = 0.5
"""How long a prediction for those who are refused is good for."""


class Engine:
    """Everything but the private methods may be called from any thread."""

    def __init__(
        self,
        load: Callable[[Pace], Loaded],
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`load` runs on the engine thread, which becomes ready when it returns."""
        self._load = load
        self._settings = settings
        self._metrics = metrics
        self.clock = clock
        self.pace = Pace()
        self.backbones: Mapping[str, Backbone] = {}
        self.max_rows: dict[str, int] = {}
        self.failure: Exception | None = None
        self._state: State = "loading"
        self._lock = threading.Condition()
        self._inbox: list[Job] = []
        self._gone: list[Job] = []
        self._waiting: dict[Job, None] = {}
        self._running: dict[Job, None] = {}
        self._predicted = (-math.inf, 0.0)
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        metrics.capacity.set(settings.max_queue)
        metrics.waiting.set_function(lambda: len(self._waiting))
        metrics.running.set_function(lambda: len(self._running))
        metrics.prompt_bytes.set_function(lambda: sum(b.prompt_cache_bytes for b in self.backbones.values()))
        metrics.ready.set_function(lambda: float(self.ready))

    @property
    def state(self) -> State:
        """Where the engine is in its life. A thread that is gone without a word counts as dead."""
        if self._state in ("ready", "draining") and not self._thread.is_alive():
            return "dead"
        return self._state

    @property
    def ready(self) -> bool:
        """Whether new work is taken."""
        return self.state == "ready"

    @property
    def ended(self) -> bool:
        """Whether its thread has nothing left to do."""
        return not self._thread.is_alive()

    @property
    def jobs(self) -> int:
        """Jobs accepted and not ended."""
        return len(self._waiting) + len(self._running)

    def start(self) -> None:
        """Start the thread, which loads the models first."""
        self._thread.start()

    def check(self) -> None:
        """Raise what a client has to be told where new work is not taken."""
        state = self.state
        if state == "loading":
            raise Loading("the models are being loaded", retry_after=RETRY_LOADING)
        if state == "dead":
            raise EngineDead("the engine has died; the server must be started anew", retry_after=60)
        if state != "ready":
            raise Draining("the server is shutting down", retry_after=retry_after(self._settings.drain_seconds))

    def submit(self, job: Job) -> None:
        """Accept a job, or raise `QueueFull` or an `Unavailable`."""
        with self._lock:
            self.check()
            if len(self._waiting) >= self._settings.max_queue:
                raise QueueFull(
                    f"{len(self._waiting)} requests are waiting already",
                    retry_after=retry_after(self._seconds_left()),
                )
            job.timing.submitted = self.clock()
            job.post(Queued(len(self._waiting)))
            self._waiting[job] = None
            self._inbox.append(job)
            self._lock.notify()

    def outlook(self, model: str, rows: int, deadline: float) -> Outlook:
        """What is expected of a request now: the wait for all that was accepted, a step of so many rows, its deadline
        in seconds from now."""
        with self._lock:
            work = [(job.model, job.rows_left) for job in (*self._running, *self._waiting)]
        return Outlook(self.pace.predict(work), self.pace.tick(model, rows), deadline, self.pace.slack(model))

    def retry_after(self) -> int:
        """Seconds until all that was accepted will be done, for a client that is turned away."""
        with self._lock:
            return retry_after(self._seconds_left())

    def _seconds_left(self) -> float:
        """Until all that was accepted is done. Asked under the lock: a flood of refusals counts only now and then."""
        now = self.clock()
        if now - self._predicted[0] > PREDICTION_SECONDS:
            work = [(job.model, job.rows_left) for job in (*self._running, *self._waiting)]
            self._predicted = (now, self.pace.predict(work))
        return self._predicted[1]

    def cancel(self, job: Job) -> None:
        """Take a job out at the next tick. Nobody waits for it any more; one that has ended is left alone.

        One that has not started leaves its place in the queue at once.
        """
        with self._lock:
            if job in self._waiting or job in self._running:
                self._waiting.pop(job, None)
                self._gone.append(job)
                self._lock.notify()

    def drain(self) -> None:
        """Take no new work from now on; what was accepted goes on."""
        with self._lock:
            if self._state in ("loading", "ready"):
                self._state = "draining"

    def close(self, timeout: float = 10.0) -> None:
        """Stop after the current tick; jobs that are left are answered with `Draining`."""
        with self._lock:
            if self._state != "dead":
                self._state = "stopped"
            self._lock.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._answer_all(Failed(Draining("the server was shut down before this request was done", retry_after=1)))

    # The engine thread

    def _main(self) -> None:
        worker: Worker | None = None
        try:
            self._set_threads()
            self.backbones, self.max_rows = self._load(self.pace)
            worker = Worker(
                self.backbones,
                self.max_rows,
                self._settings,
                self._metrics,
                self.pace,
                self.clock,
                self._begin,
                self._end,
            )
            with self._lock:
                if self._state == "loading":
                    self._state = "ready"
            while self._collect(worker):
                worker.work()
        except Exception as error:
            self.failure = error
            SERVER.critical("the engine has died", exc_info=error)
        finally:
            with self._lock:
                if self._state != "stopped":
                    self._state = "dead"
                left = [*self._waiting, *self._running]
            try:
                if worker is not None:
                    for job in left:
                        worker.drop(job)
            finally:
                if self._state == "dead":
                    self._answer_all(Failed(EngineDead("the engine has died while this request ran", retry_after=60)))

    def _set_threads(self) -> None:
        """Give operators of this thread as many cores as the settings say, or as are free."""
        if self._settings.torch_threads:
            set_threads(self._settings.torch_threads)
            return
        chosen = choose_threads(thread_count())
        set_threads(chosen.count)
        SERVER.info("operators get %d threads: %s", chosen.count, chosen.reason)

    def _collect(self, worker: Worker) -> bool:
        """Take in what came from other threads, waiting for it where there is nothing to do. False: stop."""
        if not self._called(worker, IDLE_SECONDS):
            give_back_freed_memory()
            self._called(worker, None)
        with self._lock:
            inbox, self._inbox = self._inbox, []
            gone, self._gone = self._gone, []
        for job in inbox:
            worker.add(job)
        for job in gone:
            worker.drop(job)
            self._forget(job)
        return self._state != "stopped"

    def _called(self, worker: Worker, seconds: float | None) -> bool:
        """Wait so long for something to do, or for the end; whether it came."""
        with self._lock:
            return self._lock.wait_for(
                lambda: bool(self._inbox or self._gone or worker.busy or self._state == "stopped"), seconds
            )

    def _begin(self, job: Job) -> None:
        with self._lock:
            if job in self._waiting:
                del self._waiting[job]
                self._running[job] = None

    def _end(self, job: Job, event: Event) -> None:
        self._forget(job)
        job.post(event)

    def _forget(self, job: Job) -> None:
        with self._lock:
            self._waiting.pop(job, None)
            self._running.pop(job, None)

    def _answer_all(self, event: Event) -> None:
        with self._lock:
            jobs: Iterable[Job] = [*self._waiting, *self._running]
            self._waiting.clear()
            self._running.clear()
        for job in jobs:
            job.post(event)
