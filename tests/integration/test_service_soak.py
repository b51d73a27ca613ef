"""A while of mixed load with random departures and nonsense: memory flat, nothing lost, gauges back to zero."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from models import Backbone
from tests.integration.test_service_mixed import mixed, models_of
from tests.serving import aio, serving
from tests.soak import resident_bytes, soak

SECONDS = 12.0
GROWTH = 48 * 2**20
"""Allowed between the first and the second half: allocators keep what they once needed."""


@pytest.mark.slow
@aio
async def test_soak(student_of: Callable[..., Backbone]) -> None:
    async with serving(models_of(student_of), max_rows=16) as served:
        bodies = mixed(60, seed=11)
        first = await soak(served.client, bodies, SECONDS, seed=1)
        gc.collect()
        before = resident_bytes()
        second = await soak(served.client, bodies, SECONDS, seed=2)
        gc.collect()
        assert resident_bytes() - before < GROWTH
        ends = first + second
        assert set(ends) <= {"done", "left", "422", "404"}, ends
        assert min(ends["done"], ends["left"], ends["422"]) > 0
        await served.until(lambda: served.engine.jobs == 0)
        outcomes = {o: served.total("requests_total", outcome=o) for o in ("ok", "invalid", "cancelled", "error")}
        assert outcomes["ok"] >= ends["done"]  # one may leave just after its answer was ready
        assert outcomes["invalid"] >= ends["422"] + ends["404"]
        assert outcomes["error"] == 0
        assert served.total("requests_total") <= ends.total()
        for model in ("sd", "pixart"):
            assert served.value("feature_memory_bytes", model=model) == 0
        assert served.value("requests_running") == served.value("requests_waiting") == 0
