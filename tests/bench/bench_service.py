"""The service over a real socket against diffusers in this process. `slipstream bench service`

Targets: one request through HTTP costs at most 1.05 of the same pipeline call; 16 at once finish at least twice as soon
as one after another through diffusers. `--soak MINUTES` then runs mixed load with departures and nonsense against the
same server, and shows its memory over time.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import torch
from matplotlib.figure import Figure

from tests.bench import peers, zoo
from tests.bench.harness import note, options, quiet, race
from tests.bench.report import Report
from tests.bench.runs import fresh_prompt
from tests.soak import resident_bytes, soak

MODEL = "shapes-sd"
TOGETHER = 16
HTTP_TARGET, TOGETHER_TARGET = 1.05, 0.5
SOAK_WINDOW = 60.0
SOAKED = (
    None,
    {"mode": "deepcache", "interval": 3},
    {"mode": "selective_guidance", "stop": 0.6},
    [{"mode": "deepcache", "interval": 2}, {"mode": "selective_guidance", "stop": 0.6}],
)


@contextmanager
def server(threads: int) -> Iterator[tuple[str, int]]:
    """`slipstream serve` as a process of its own; its address and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "app.cli",
        "serve",
        "--port",
        str(port),
        "--device",
        "cpu",
        "--log-level",
        "warning",
    ]
    process = subprocess.Popen([*command, "--torch-threads", str(threads)], env=os.environ | {"TQDM_DISABLE": "1"})
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}")
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Measure, and soak where that is asked for."""
    given = options(__doc__, soak=0.0, threads=torch.get_num_threads(), steps=25)
    quiet()
    torch.set_num_threads(given.threads)
    report = Report("service", "The service over HTTP, over diffusers in one process", given)
    model = zoo.model(MODEL)
    pipeline, scale = model.pipeline(), model.backbone.spec.default_guidance_scale
    steps = 2 if given.quick else given.steps
    memory: list[float] = []
    with server(given.threads) as (url, pid), httpx.Client(base_url=url, timeout=600) as client:

        def post() -> None:
            body = {"prompt": fresh_prompt(model), "model": MODEL, "num_inference_steps": steps, "seed": 0}
            client.post("/generate", json=body).raise_for_status()

        def all_at_once() -> None:
            with ThreadPoolExecutor(TOGETHER) as clients:
                list(clients.map(lambda _: post(), range(TOGETHER)))

        def draw() -> None:
            peers.draw(pipeline, fresh_prompt(model), steps, scale)

        def one_after_another() -> None:
            for _ in range(TOGETHER):
                draw()

        rounds = given.rounds or (1 if given.quick else 9)
        note(f"one request, {rounds} rounds")
        single = race({"diffusers": draw, "HTTP": post}, rounds, warmup=2)
        note(f"{TOGETHER} requests, {rounds} rounds")
        many = race({"diffusers": one_after_another, "HTTP": all_at_once}, 1 if given.quick else max(1, rounds // 2))
        rows: list[dict[str, object]] = []
        for label, timed, target in (("1", single, HTTP_TARGET), (f"{TOGETHER}", many, TOGETHER_TARGET)):
            for way in ("diffusers", "HTTP"):
                over = timed.ratio(way, "diffusers")
                row = {"requests": label, "through": way, "ms": timed.time(way).times(1000), "over diffusers": over}
                rows.append(row | {"target": target if way == "HTTP" else ""})
        report.table(f"{MODEL}, {steps} steps, guided, {given.threads} threads", rows)
        if given.soak:
            ends, memory = soaked(url, pid, given.soak * 60)
            report.remark(f"Soak of {given.soak:g} minutes: {dict(ends)}; resident MiB by window: {memory}.")
            waiting = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith(GAUGES)]
            report.remark(f"Gauges afterwards: {', '.join(waiting)}.")

    def draw_figure(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (label, timed) in enumerate((("1 request", single), (f"{TOGETHER} requests", many))):
            for j, way in enumerate(("diffusers", "HTTP")):
                axes.bar(i + 0.4 * j, timed.ratio(way, "diffusers").median, 0.38, label=way if not i else None)
            axes.text(i + 0.2, 0.02, label, ha="center")
        axes.set_ylabel("time over diffusers")
        axes.set_xticks([])
        axes.legend()

    report.save(draw_figure)


GAUGES = ("slipstream_requests_running", "slipstream_requests_waiting", "slipstream_feature_memory_bytes")


def soaked(url: str, pid: int, seconds: float) -> tuple[Counter[str], list[float]]:
    """Run the mixed load in windows; how requests ended, and the server's resident MiB after each window."""
    bodies = [
        {
            "prompt": f"a {colour} ring on a white background",
            "model": model,
            "num_inference_steps": count,
            "seed": count,
        }
        | (
            {}
            if acceleration is None or (model != MODEL and "deepcache" in str(acceleration))
            else {"acceleration": acceleration}
        )
        for colour in ("red", "green", "blue")
        for model in (MODEL, "shapes-dit")
        for count in (4, 9, 15)
        for acceleration in SOAKED
    ]

    async def run(window: float, seed: int) -> Counter[str]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
            return await soak(client, bodies, window, clients=16, seed=seed)

    ends: Counter[str] = Counter()
    memory: list[float] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ends += asyncio.run(run(min(SOAK_WINDOW, until - time.monotonic()), len(memory)))
        memory.append(round(resident_bytes(pid) / 2**20, 1))
        note(f"{dict(ends)}, {memory[-1]} MiB")
    time.sleep(3)
    return ends, memory


if __name__ == "__main__":
    main()
