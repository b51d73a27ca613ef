"""The soak of `slipstream bench service --soak MINUTES`: mixed load with departures against one server.

What counts: every request ends as it should, resident memory over the last two thirds, gauges afterwards, and whether
pictures that were made among all the others are those that the same requests give alone.
"""

from __future__ import annotations

import asyncio
import base64
import io
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image

from tests.bench.harness import note
from tests.bench.report import Row
from tests.soak import resident_bytes, soak

WINDOW_SECONDS = 60.0
CLIENTS = 16
SAMPLE = 200
FLAT_MIB = 32.0
"""How much more the server may hold at the end than after the first third."""
EXPECTED = frozenset({"done", "left", "404", "422"})
GAUGES = ("requests_running", "requests_waiting", "feature_memory_bytes", "waiting_bytes", "body_bytes")
ACCELERATIONS: tuple[Any, ...] = (
    None,
    {"mode": "deepcache", "interval": 3},
    {"mode": "forecast", "interval": 2},
    {"mode": "selective_guidance", "stop": 0.6},
    [{"mode": "deepcache", "interval": 2}, {"mode": "selective_guidance", "stop": 0.6}],
)


@dataclass
class Sample:
    """So many of all answers that have a picture, each as likely as any other."""

    size: int
    draw: random.Random
    seen: int = 0
    kept: list[tuple[dict[str, Any], bytes]] = field(default_factory=list)

    def offer(self, body: dict[str, Any], answer: httpx.Response) -> None:
        """An answer came."""
        if answer.status_code != 200 or body["stream"]:
            return
        self.seen += 1
        at = len(self.kept) if len(self.kept) < self.size else self.draw.randrange(self.seen)
        if at < self.size:
            self.kept[at : at + 1] = [(body, picture(answer))]


def picture(answer: httpx.Response) -> bytes:
    """The file of the first image of an answer."""
    return base64.b64decode(answer.json()["images"][0]["b64_json"])


def pixels(file: bytes) -> np.ndarray[Any, np.dtype[np.int16]]:
    """[height, width, 3]."""
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), dtype=np.int16)


def bodies(models: Sequence[str], draw: random.Random) -> list[dict[str, Any]]:
    """Requests of both models, many numbers of steps, seeds and accelerations."""
    found = []
    for number in range(600):
        model = models[number % len(models)]
        fitting = [a for a in ACCELERATIONS if model == models[0] or "deepcache" not in str(a)]
        acceleration = draw.choice(fitting)
        body: dict[str, Any] = {
            "prompt": f"a {draw.choice(('red', 'green', 'blue'))} ring on a white background",
            "model": model,
            "num_inference_steps": draw.choice((4, 9, 15)),
            "seed": draw.randrange(2**31),
        }
        found.append(body | ({} if acceleration is None else {"acceleration": acceleration}))
    return found


def soaked(url: str, pid: int, seconds: float, models: Sequence[str], seed: int = 0) -> list[Row]:
    """Run the load in windows; then what became of it as rows of what, figure, limit, and whether it held."""
    draw = random.Random(seed)
    asked, sample = bodies(models, draw), Sample(SAMPLE, draw)

    async def window(length: float, number: int) -> Counter[str]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
            return await soak(client, asked, length, clients=CLIENTS, seed=number, answered=sample.offer)

    ends: Counter[str] = Counter()
    memory: list[float] = []
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        ends += asyncio.run(window(min(WINDOW_SECONDS, left), len(memory)))
        memory.append(round(resident_bytes(pid) / 2**20, 1))
        note(f"{dict(ends)}, {memory[-1]} MiB")
    time.sleep(3)
    gauges = {name: gauge(url, name) for name in GAUGES}
    note(f"Resident MiB by window: {memory}.")
    late = memory[len(memory) // 3 :]
    lost = {end: count for end, count in ends.items() if end not in EXPECTED}
    return [
        judged("requests", f"{ends.total()}: {dict(sorted(ends.items()))}", "", ends.total() > 0),
        judged("ended in another way than done, left or refused", sum(lost.values()), 0, not lost),
        judged(
            "MiB more at the end than after a third",
            f"{late[-1] - late[0]:.1f} (from {memory[0]}; {late[0]} to {late[-1]}, most {max(memory)})",
            FLAT_MIB,
            late[-1] - late[0] <= FLAT_MIB,
        ),
        judged("gauges afterwards", sum(gauges.values()), 0, not any(gauges.values())),
        alone(url, sample.kept),
    ]


def judged(what: str, figure: object, limit: object, held: bool) -> Row:
    """A row of the table."""
    return {"what": what, "figure": figure, "limit": limit, "held": "held" if held else "NOT"}


def gauge(url: str, name: str) -> float:
    """The sum over all series of a metric."""
    lines = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith(f"slipstream_{name}")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def alone(url: str, sample: Sequence[tuple[dict[str, Any], bytes]]) -> Row:
    """Send the sampled requests again, one by one, and compare: equal but for single levels of rounding."""
    exact, most, share = 0, 0, 0.0
    with httpx.Client(base_url=url, timeout=600) as client:
        for body, mixed in sample:
            again = picture(client.post("/generate", json=body).raise_for_status())
            apart = np.abs(pixels(mixed) - pixels(again))
            exact += not apart.any()
            most, share = max(most, int(apart.max())), max(share, float((apart > 0).mean()))
    figure = f"{exact} of {len(sample)} bit for bit, the others by {most} level in {100 * share:.2f}% at most"
    held = len(sample) > 0 and most <= 1 and share < 0.01
    return judged("alone = mixed", figure, "1 level in 1%", held)
