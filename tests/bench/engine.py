"""The server's engine without HTTP: requests in, pictures out, from any thread."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from queue import Queue

from app.engine.engine import Engine
from app.engine.job import Event, Failed, Finished, Job
from app.metrics import Metrics
from app.settings import Settings
from models import Request
from models.resolve import resolve
from tests.bench.zoo import Model

_numbers = count()


class Served:
    """One model behind a running engine."""

    def __init__(self, engine: Engine, model: Model) -> None:
        self._engine = engine
        self._model = model

    def draw(self, request: Request) -> list[object]:
        """The pictures of one request; waits for them."""
        backbone = self._model.backbone
        events: Queue[Event] = Queue()
        run = resolve(backbone.spec, backbone.scheduler_config, request)
        self._engine.submit(Job(str(next(_numbers)), self._model.name, run, "none", events.put))
        while True:
            event = events.get(timeout=600)
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                return list(event.images)


@contextmanager
def engine(model: Model, max_rows: int = 16) -> Iterator[Served]:
    """An engine that serves one model."""
    settings = Settings(model=(model.name,), max_rows=max_rows)
    running = Engine(lambda pace: ({model.name: model.backbone}, {model.name: max_rows}), settings, Metrics())
    running.start()
    while running.state == "loading":
        time.sleep(0.01)
    try:
        running.check()
        yield Served(running, model)
    finally:
        running.close()
