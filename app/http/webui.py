"""What AUTOMATIC1111's API keeps of a client: its options, and its requests that run. Used on the loop only."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from app.http.generation import Generation

MOST = 1024
"""Clients whose options are kept; those that were not heard of for longest give way."""


class Running:
    """One request that runs, and whether it is to end early."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.interrupted = asyncio.Event()

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        job = self.generation.job
        return min(1.0, job.steps_done / max(1, job.total_steps))


class Clients:
    """Every client's options, by what tells clients apart, and their running requests, the oldest first."""

    def __init__(self) -> None:
        self._options: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._running: dict[str, list[Running]] = {}

    def options(self, client: str) -> dict[str, Any]:
        """What a client has set."""
        return self._options.get(client, {})

    def set(self, client: str, options: dict[str, Any]) -> None:
        """Set some of a client's options."""
        self._options[client] = self._options.pop(client, {}) | options
        while len(self._options) > MOST:
            self._options.popitem(last=False)

    @contextmanager
    def run(self, client: str, generation: Generation) -> Iterator[Running]:
        """Know of a request for as long as it runs."""
        running = Running(generation)
        self._running.setdefault(client, []).append(running)
        try:
            yield running
        finally:
            self._running[client].remove(running)
            if not self._running[client]:
                del self._running[client]

    def running(self, client: str) -> list[Running]:
        """A client's requests that run."""
        return self._running.get(client, [])
