"""Mixed load with departures and nonsense: what the suite runs for seconds and the benchmark for half an hour."""

from __future__ import annotations

import asyncio
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

NONSENSE: Sequence[dict[str, Any]] = (
    {"width": 7},
    {"model": "nope"},
    {"acceleration": {"mode": "warp9"}},
    {"unknown": 1},
    {"num_inference_steps": -1},
)


async def soak(
    client: httpx.AsyncClient,
    bodies: Sequence[dict[str, Any]],
    seconds: float,
    clients: int = 12,
    seed: int = 0,
    answered: Callable[[dict[str, Any], httpx.Response], None] = lambda body, answer: None,
) -> Counter[str]:
    """Run closed-loop clients; one in eight leaves early, one in eight sends nonsense. Counts the ends by kind.

    `answered` is given every request that was answered, with its answer.
    """
    ends: Counter[str] = Counter()
    until = time.monotonic() + seconds

    async def one(draw: random.Random) -> None:
        while time.monotonic() < until:
            body = dict(draw.choice(bodies)) | {"stream": draw.random() < 0.3, "partial_images": draw.randint(0, 1)}
            fate = draw.randrange(8)
            if fate == 0:
                body |= draw.choice(NONSENSE)
            request = asyncio.ensure_future(client.post("/generate", json=body))
            if fate == 1:
                await asyncio.sleep(draw.random() * 0.2)
                request.cancel()
            try:
                answer = await request
            except asyncio.CancelledError:
                ends["left"] += 1
                continue
            answered(body, answer)
            done = answer.status_code == 200 and (not body["stream"] or "event: completed" in answer.text)
            ends["done" if done else f"{answer.status_code}"] += 1

    await asyncio.gather(*(one(random.Random(seed * 1000 + i)) for i in range(clients)))
    return ends


def resident_bytes(pid: int | str = "self") -> int:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()
