"""A server on the small random pipelines, in this process: the real app over ASGI, its engine on its own thread."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx
import numpy as np
import torch
from fastapi import FastAPI
from PIL import Image
from torch import Tensor

from app.engine.engine import Engine
from app.http.main import create_app
from app.settings import Settings
from models import Backbone, Plan
from models.reuse.rows import Row
from models.search.attention_plan import Method

PROMPT = "a large red circle on a white background"


@dataclass
class Served:
    """The app, a client of it, and its engine."""

    app: FastAPI
    client: httpx.AsyncClient
    engine: Engine

    async def post(
        self, path: str = "/generate", headers: Mapping[str, str] | None = None, **body: Any
    ) -> httpx.Response:
        """POST a JSON body; a prompt is filled in, and few steps where none are given."""
        body = {"prompt": PROMPT, "num_inference_steps": 3, "seed": 1} | body
        return await self.client.post(path, json=body, headers=dict(headers or {}))

    def value(self, name: str, **labels: str) -> float:
        """A metric's value; 0 where it has never been counted."""
        found = self.app.state.metrics.registry.get_sample_value(f"slipstream_{name}", labels)
        return float(found or 0.0)

    def total(self, name: str, **labels: str) -> float:
        """The sum over all series of a metric that have these labels."""
        samples = (s for family in self.app.state.metrics.registry.collect() for s in family.samples)
        wanted = f"slipstream_{name}"
        return float(sum(s.value for s in samples if s.name == wanted and labels.items() <= s.labels.items()))

    async def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait for something to become true."""
        await until(condition, seconds)


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something to become true; TimeoutError where it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not come true")
        await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(backbones: Mapping[str, Backbone], **settings: Any) -> AsyncIterator[Served]:
    """The app with its lifespan, ready; its engine goes by `clock` where one is given."""
    options = {"torch_threads": 1, "max_rows": 8, **settings}
    clock = options.pop("clock", None)
    app = create_app(Settings(model=tuple(backbones), **options), backbones)
    app.state.engine.clock = clock or app.state.engine.clock
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            served = Served(app, client, app.state.engine)
            await served.until(lambda: served.engine.state != "loading")
            yield served


class Hook:
    """A network that calls `before(rows)` ahead of every forward: to raise, to wait, or to look."""

    def __init__(self, network: Any, before: Callable[[Sequence[Row]], None]) -> None:
        self._network = network
        self._before = before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def forward(self, x: Tensor, t: Tensor, conditioning: Any, rows: Sequence[Row], *rest: Any) -> Tensor:
        """Look first, then run."""
        self._before(rows)
        result: Tensor = self._network.forward(x, t, conditioning, rows, *rest)
        return result


def hooked(backbone: Backbone, before: Callable[[Sequence[Row]], None]) -> Backbone:
    """The same backbone with `before` ahead of every forward."""
    return replace(backbone, network=Hook(backbone.network, before))


def slowed(backbone: Backbone, seconds: float) -> Backbone:
    """The same backbone with forwards that take at least this long."""
    return hooked(backbone, lambda _: time.sleep(seconds))


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The events of an SSE body: names and data."""
    found = []
    for block in text.replace("\r\n", "\n").split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and not line.startswith(":"))
        if "data" in lines:
            found.append((lines.get("event", "message"), json.loads(lines["data"])))
    return found


def one_thread() -> None:
    """Keep this process's other threads from taking the second core."""
    torch.set_num_threads(1)


def aio(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A coroutine as a test."""

    @functools.wraps(test)
    def run(*arguments: Any, **fixtures: Any) -> None:
        asyncio.run(test(*arguments, **fixtures))

    return run


def pixels(answer: Mapping[str, Any], index: int = 0) -> np.ndarray[Any, np.dtype[np.int16]]:
    """An image of a JSON answer as numbers [height, width, 3]."""
    data = base64.b64decode(answer["images"][index]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int16)


def with_plan(backbone: Backbone, name: str, num_inference_steps: int) -> Backbone:
    """The same transformer with a DiTFastAttn plan that uses every method, for its native size under guidance."""
    spec = backbone.spec
    methods: tuple[Method, ...] = ("full", "ast", "wa-rs", "asc", "wa-rs+asc")
    table = [("full",) * spec.depth] + [
        tuple(methods[(step + block) % len(methods)] for block in range(spec.depth))
        for step in range(1, num_inference_steps)
    ]
    plan = Plan(
        model=spec.name,
        config_hash=spec.config_hash,
        scheduler="ddim",
        num_inference_steps=num_inference_steps,
        tokens=spec.tokens(spec.native_width, spec.native_height),
        guidance=True,
        window=6,
        threshold=0.1,
        table=tuple(table),
    )
    return replace(backbone, spec=spec.with_extras(spec.adapters, {**spec.plans, name: plan}))
