"""The engine on its thread: whom it takes in, what it answers, and how it ends. Forwards wait at a gate."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from app.engine import engine
from app.engine.engine import Engine
from app.engine.job import Event, Failed, Job, Progress, Queued
from app.engine.pace import Pace
from app.errors import Draining, EngineDead, Loading, QueueFull, Unavailable
from app.metrics import Metrics
from app.settings import Settings
from models.accelerators import DeepCache
from models.trajectory import Trajectory
from tests.unit.fakes import FEATURE_BYTES, Clock, FakeBackbone, error_of, greys, make_job, sample

PATIENCE = 20.0
"""Seconds until a test that waits for what never comes fails."""


class Gate:
    """Where every forward waits to be let through; `closed` says that one stands before it."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self._tickets = threading.Semaphore(0)
        self._open = False

    def __call__(self, seeds: list[int]) -> None:
        """A forward."""
        if not self._open:
            self.closed.set()
            assert self._tickets.acquire(timeout=PATIENCE)

    def wait(self) -> None:
        """Until a forward stands before it."""
        assert self.closed.wait(PATIENCE)

    def one(self) -> None:
        """Let one forward through, and wait for the next."""
        self.wait()
        self.closed.clear()
        self._tickets.release()
        self.wait()

    def open(self) -> None:
        """Let all forwards through from now on."""
        self._open = True
        self._tickets.release(1000)


class Running:
    """An engine with a gate before its forwards."""

    def __init__(self, load: Callable[[], object] = lambda: None, max_rows: int = 2, **settings: Any) -> None:
        self.backbone, self.gate, self.clock, self.metrics = FakeBackbone(), Gate(), Clock(), Metrics()
        self.backbone.before = self.gate
        self.events: dict[Job, queue.Queue[Event]] = {}

        def loaded(pace: Pace) -> Any:
            load()
            return {"unet": self.backbone.real}, {"unet": max_rows}

        self.engine = Engine(loaded, Settings(**settings), self.metrics, self.clock)

    def start(self) -> None:
        """Start, and wait until it is ready."""
        self.engine.start()
        self.until(lambda: self.engine.ready)

    def submit(self, seed: int, images: int = 1, **options: Any) -> Job:
        """A new job, accepted; its events wait in `events`."""
        events: queue.Queue[Event] = queue.Queue()
        job = make_job(self.backbone, seed, images, post=options.pop("post", events.put), **options)
        self.engine.submit(job)
        self.events[job] = events
        return job

    def last(self, job: Job) -> Event:
        """The event that ends a job; waits for it."""
        while isinstance(event := self.events[job].get(timeout=PATIENCE), Queued | Progress):
            pass
        return event

    def state(self) -> str:
        """Where the engine is in its life."""
        return self.engine.state

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what no event tells."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def value(self, name: str, **labels: str) -> float:
        """A metric's value."""
        return sample(self.metrics, name, **labels)


@contextmanager
def running(**options: Any) -> Iterator[Running]:
    """A ready engine."""
    served = Running(**options)
    served.start()
    try:
        yield served
    finally:
        served.gate.open()
        served.engine.close()


# Taking in


def test_a_life() -> None:
    with running() as served:
        assert (served.engine.state, served.engine.ready, served.value("ready")) == ("ready", True, 1)
        served.clock.now = 5.0
        job = served.submit(7, 2, progress=True)
        served.gate.wait()
        assert (served.engine.jobs, served.value("requests_running"), served.value("requests_waiting")) == (1, 1, 0)
        served.clock.now = 9.0
        served.gate.open()
        events = [served.events[job].get(timeout=PATIENCE) for _ in range(4)]
        assert events[:3] == [Queued(0), Progress(2, 4), Progress(4, 4)]
        assert greys(events[3]) == [7, 8]
        assert job.timing.submitted == 5.0
        assert job.timing.finished == 9.0
        assert (served.engine.jobs, served.value("requests_running"), served.value("requests_waiting")) == (0, 0, 0)


def test_the_engine_serves_what_was_loaded_with_the_cap_that_was_found() -> None:
    with running(max_rows=3) as served:
        served.gate.open()
        assert dict(served.engine.backbones) == {"unet": served.backbone.real}
        assert served.engine.max_rows == {"unet": 3}
        job = served.submit(1, 5, steps=1)
        assert greys(served.last(job)) == [1, 2, 3, 4, 5]
        assert served.backbone.ticks == [[1, 2, 3], [4, 5]]


def test_operators_on_the_engines_thread_take_the_threads_of_the_settings() -> None:
    seen: list[int] = []
    served = Running(load=lambda: seen.append(torch.get_num_threads()), torch_threads=3)
    try:
        served.start()
        assert seen == [3]
    finally:
        served.engine.close()
        torch.set_num_threads(1)


def test_places_in_the_queue_and_its_end() -> None:
    with running(max_queue=2, max_rows=1) as served:
        assert served.value("queue_capacity") == 2
        first = served.submit(1)
        served.gate.wait()
        others = [served.submit(2), served.submit(3)]
        assert [served.events[job].get(timeout=PATIENCE) for job in (first, *others)] == [
            Queued(0),
            Queued(0),
            Queued(1),
        ]
        assert (served.engine.jobs, served.value("requests_running"), served.value("requests_waiting")) == (3, 1, 2)
        with pytest.raises(QueueFull, match="2 requests are waiting"):
            served.submit(4)
        assert served.value("requests_waiting") == 2
        served.engine.cancel(others[1])
        served.gate.one()
        last = served.submit(5)
        served.gate.open()
        assert [greys(served.last(job)) for job in (first, others[0], last)] == [[1], [2], [5]]


def test_a_full_queue_says_how_long_all_that_was_accepted_takes() -> None:
    with running(max_queue=1) as served:
        served.engine.pace.observe("unet", 1, 2.5)
        served.submit(1, steps=3)
        served.gate.wait()
        served.submit(2, 2, steps=2)
        with pytest.raises(QueueFull) as raised:
            served.submit(3)
        assert raised.value.retry_after == 18  # 2.5 seconds for each of 3 and 4 rows, in whole seconds

        # A prediction is good for half a second.
        served.engine.pace.observe("unet", 1, 100.0)
        served.clock.now += 0.5
        with pytest.raises(QueueFull) as raised:
            served.submit(3)
        assert raised.value.retry_after == 18
        served.clock.now += 0.01
        with pytest.raises(QueueFull) as raised:
            served.submit(3)
        assert raised.value.retry_after == 86  # 2.5 + 0.1 * 97.5 a row


# Leaving


def test_a_cancelled_job_is_in_no_later_tick_and_holds_nothing() -> None:
    with running(max_rows=4) as served:
        gone = served.submit(1, steps=9, acceleration=DeepCache(interval=3))
        served.gate.one()
        assert served.value("feature_memory_bytes", model="unet") == FEATURE_BYTES
        stays = served.submit(2, steps=2)
        served.engine.cancel(gone)
        assert served.engine.jobs == 2
        served.gate.one()  # the tick that was chosen already
        assert served.engine.jobs == 1
        assert served.value("requests_running") == 1
        assert served.value("feature_memory_bytes", model="unet") == 0
        served.gate.open()
        assert greys(served.last(stays)) == [2]
        assert served.backbone.ticks == [[1], [1], [2], [2]]
        assert served.events[gone].qsize() == 1  # queued, and nothing more


def test_a_job_cancelled_while_it_waits_is_never_started() -> None:
    with running(max_rows=1) as served:
        first = served.submit(1)
        served.gate.wait()
        gone, last = served.submit(2), served.submit(3)
        served.engine.cancel(gone)
        served.gate.one()
        assert (served.value("requests_running"), served.value("requests_waiting")) == (1, 1)
        served.gate.open()
        assert [greys(served.last(job)) for job in (first, last)] == [[1], [3]]
        assert served.backbone.ticks == [[1], [1], [3], [3]]
        assert served.value("queue_duration_seconds_count", model="unet") == 2


def test_a_job_that_is_done_or_unknown_cannot_be_cancelled() -> None:
    with running() as served:
        served.gate.open()
        job = served.submit(1)
        assert greys(served.last(job)) == [1]
        served.engine.cancel(job)
        served.engine.cancel(make_job(served.backbone, 2))
        assert served.engine.jobs == 0
        assert greys(served.last(served.submit(3))) == [3]
        assert served.engine.ready


def test_an_idle_engine_wakes_for_a_job_again_and_again() -> None:
    with running() as served:
        served.gate.open()
        for seed in range(1, 6):
            assert greys(served.last(served.submit(seed))) == [seed]
        assert served.engine.jobs == 0


# Draining


def test_a_drain_finishes_what_was_accepted_and_takes_nothing_new() -> None:
    with running(max_rows=1, drain_seconds=7.5) as served:
        jobs = [served.submit(1), served.submit(2)]
        served.gate.wait()
        served.engine.drain()
        assert (served.engine.state, served.engine.ready, served.value("ready")) == ("draining", False, 0)
        with pytest.raises(Draining) as raised:
            served.submit(3)
        assert raised.value.retry_after == 8
        assert served.engine.jobs == 2
        served.gate.open()
        assert [greys(served.last(job)) for job in jobs] == [[1], [2]]
        assert served.state() == "draining"


def test_a_drain_while_the_models_load_is_kept() -> None:
    may_load = threading.Event()
    served = Running(load=lambda: may_load.wait(PATIENCE))
    assert served.state() == "loading"
    served.engine.start()
    with pytest.raises(Loading) as raised:
        served.submit(1)
    assert raised.value.retry_after == 5
    served.engine.drain()
    may_load.set()
    served.until(lambda: bool(served.engine.backbones))
    with pytest.raises(Draining):
        served.submit(1)
    served.engine.close()
    assert served.state() == "stopped"


# Closing


def test_freed_memory_goes_back_once_where_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    given, back = list[bool](), threading.Event()

    def give_back() -> None:
        given.append(served.backbone.ticks != [])
        back.set()

    monkeypatch.setattr(engine, "IDLE_SECONDS", 0.01)
    monkeypatch.setattr(engine, "give_back_freed_memory", give_back)
    with running(max_rows=1) as served:
        assert back.wait(PATIENCE), "after loading"
        job = served.submit(1)
        served.gate.wait()
        back.clear()
        assert given == [False], "not while a tick runs"
        served.gate.open()
        served.last(job)
        assert back.wait(PATIENCE)
    assert given == [False, True], "and once only"


def test_who_leaves_before_its_start_gives_its_place_up_while_the_tick_still_runs() -> None:
    with running(max_rows=1, max_queue=1) as served:
        served.submit(1, steps=9)
        served.gate.wait()
        waits = served.submit(2, steps=9)
        with pytest.raises(QueueFull):
            served.submit(3)
        served.engine.cancel(waits)
        assert served.value("requests_waiting") == 0
        follows = served.submit(4, steps=1)
        served.gate.open()
        assert greys(served.last(follows)) == [4]
        assert not any(2 in tick for tick in served.backbone.ticks)


def test_closing_answers_what_is_left_after_the_current_tick() -> None:
    with running(max_rows=1) as served:
        runs, waits = served.submit(1, steps=9, progress=True), served.submit(2, steps=9)
        served.gate.wait()
        closing = threading.Thread(target=served.engine.close)
        closing.start()
        served.until(lambda: served.engine.state == "stopped")
        assert served.events[waits].qsize() == 1, "nobody is answered while a tick runs"
        served.gate.open()
        closing.join(PATIENCE)
        for job in (runs, waits):
            error = error_of(served.last(job))
            assert (type(error), error.retry_after) == (Draining, 1)
        assert served.backbone.ticks == [[1]]
        assert served.engine.jobs == 0
        with pytest.raises(Draining):
            served.submit(3)
        served.engine.drain()
        served.engine.close()
        assert served.state() == "stopped"
        assert served.events[runs].empty()


def test_closing_does_not_wait_for_ever() -> None:
    with running() as served:
        job = served.submit(1)
        served.gate.wait()
        served.engine.close(timeout=0.01)
        assert isinstance(error_of(served.last(job)), Draining)
        assert served.state() == "stopped"


def test_closing_an_idle_engine_ends_its_thread() -> None:
    before = set(threading.enumerate())
    with running() as served:
        assert set(threading.enumerate()) - before
    assert not set(threading.enumerate()) - before
    assert served.state() == "stopped"


def test_an_engine_that_never_started_can_be_closed() -> None:
    served = Running()
    served.engine.close()
    assert served.state() == "stopped"


# Dying


def dies(event: Event) -> None:
    """A bug, told once a tick is done."""
    if isinstance(event, Progress):
        raise LookupError("a bug")


def test_a_dead_engine_answers_the_running_and_the_waiting() -> None:
    with running(max_rows=2) as served:
        culprit = served.submit(1, progress=True, post=dies)
        beside, waits = served.submit(2), served.submit(3)
        served.gate.open()
        for job in (beside, waits):
            error = error_of(served.last(job))
            assert (type(error), error.retry_after) == (EngineDead, 60)
        assert culprit.timing.finished == 0.0
        assert (served.engine.state, served.engine.ready, served.engine.jobs) == ("dead", False, 0)
        assert (served.value("ready"), served.value("requests_running"), served.value("requests_waiting")) == (0, 0, 0)
        assert isinstance(served.engine.failure, LookupError)
        with pytest.raises(EngineDead) as raised:
            served.submit(4)
        assert raised.value.retry_after == 60
        served.engine.drain()
        assert served.state() == "dead"
        served.engine.close()
        assert served.state() == "dead"
        assert all(served.events[job].empty() for job in (beside, waits))


@pytest.mark.parametrize("error", [torch.AcceleratorError("CUDA error: device-side assert triggered"), LookupError])
def test_a_poisoned_device_and_a_bug_end_the_engine_and_hold_no_features(error: Exception) -> None:
    """Two run, with features remembered; the poison is met once, and never tried again."""
    with running(max_rows=2) as served:
        jobs = [served.submit(seed, steps=9, acceleration=DeepCache(interval=3)) for seed in (1, 2)]
        waits = served.submit(3, steps=9)
        served.gate.one()
        assert served.value("feature_memory_bytes", model="unet") == 2 * FEATURE_BYTES
        tried: list[list[int]] = []

        def before(seeds: list[int]) -> None:
            tried.append(seeds)
            raise error

        def finite(trajectory: object) -> bool:
            raise error

        forward = isinstance(error, torch.AcceleratorError)
        with pytest.MonkeyPatch.context() as patch:
            if forward:
                served.backbone.before = before
            else:
                patch.setattr(Trajectory, "memory_bytes", finite)
            served.gate.open()
            assert [type(error_of(served.last(job))) for job in (*jobs, waits)] == [EngineDead] * 3
        assert tried == ([[1, 2]] if forward else [])
        assert served.state() == "dead"
        assert served.value("feature_memory_bytes", model="unet") == 0
        assert all(lane.trajectory is None for job in jobs for lane in job.lanes)


def test_a_closed_engine_holds_no_features() -> None:
    with running() as served:
        job = served.submit(1, steps=9, acceleration=DeepCache(interval=3))
        served.gate.one()
        closing = threading.Thread(target=served.engine.close)
        closing.start()
        served.until(lambda: served.state() == "stopped")
        served.gate.open()
        closing.join(PATIENCE)
        assert isinstance(error_of(served.last(job)), Draining)
        assert served.value("feature_memory_bytes", model="unet") == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [OSError("no such model"), SystemExit()])
def test_an_engine_that_cannot_load_is_dead(error: BaseException) -> None:
    def load() -> None:
        raise error

    served = Running(load=load)
    served.engine.start()
    served.until(lambda: served.engine.state == "dead")
    assert served.engine.failure is (error if isinstance(error, Exception) else None)
    with pytest.raises(EngineDead):
        served.submit(1)
    served.engine.close()


def test_a_thread_that_is_not_there_counts_as_dead() -> None:
    served = Running()
    assert served.state() == "loading"
    served.engine.drain()
    assert served.state() == "dead"


def test_jobs_are_refused_by_what_the_engine_does() -> None:
    """Each refusal has its own status, code and time."""
    served = Running(drain_seconds=30)
    served.engine.close()
    with pytest.raises(Unavailable) as raised:
        served.engine.check()
    assert (raised.value.code, raised.value.retry_after) == ("draining", 30)
    assert isinstance(Failed(raised.value).error, Draining)
