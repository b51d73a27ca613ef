"""The service over a real socket against diffusers in this process. `slipstream bench service`

Targets: one request through HTTP costs at most 1.05 of the same pipeline call; 16 at once finish at least twice as soon
as one after another through diffusers. `--soak MINUTES` then runs mixed load with departures and nonsense against the
same server, and says what became of it (`soaked.py`); the exit code is 1 where something of that did not hold.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import torch
from matplotlib.figure import Figure

from tests.bench import peers, zoo
from tests.bench.harness import Race, note, options, quiet, race
from tests.bench.report import Report, Row
from tests.bench.runs import fresh_prompt
from tests.bench.soaked import soaked

MODEL = "shapes-sd"
TOGETHER = 16
HTTP_TARGET, TOGETHER_TARGET = 1.05, 0.5


@contextmanager
def server(threads: int, dtype: str) -> Iterator[tuple[str, int]]:
    """`slipstream serve` as a process of its own; its address and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = {"port": port, "device": "cpu", "log-level": "warning", "torch-threads": threads, "dtype": dtype}
    command = [sys.executable, "-m", "app.cli", "serve", *(f"--{name}={value}" for name, value in flags.items())]
    process = subprocess.Popen(command, env=os.environ | {"TQDM_DISABLE": "1"})
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


def compare(model: zoo.Model, client: httpx.Client, dtype: str, steps: int, rounds: int) -> tuple[Race, Race]:
    """One request, then `TOGETHER` at once, against a diffusers pipeline of the same precision."""
    pipeline = model.pipeline().to(getattr(torch, dtype))
    scale = model.backbone.spec.default_guidance_scale

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

    note(f"{dtype}: {rounds} rounds of one request, half as many of {TOGETHER}")
    single = race({"diffusers": draw, "HTTP": post}, rounds, warmup=2)
    return single, race({"diffusers": one_after_another, "HTTP": all_at_once}, max(1, rounds // 2))


def main() -> None:
    """Measure, and soak where that is asked for."""
    given = options(
        __doc__, soak=0.0, threads=torch.get_num_threads(), steps=25, dtypes=["float32", "bfloat16"], no_race=False
    )
    quiet()
    torch.set_num_threads(given.threads)
    report = Report("service", "The service over HTTP, over diffusers in one process", given)
    model = zoo.model(MODEL)
    steps, rounds = (2, 1) if given.quick else (given.steps, given.rounds or 9)
    found: dict[str, tuple[Race, Race]] = {}
    soak: list[Row] = []
    for dtype in () if given.no_race else given.dtypes:
        with server(given.threads, dtype) as (url, _), httpx.Client(base_url=url, timeout=600) as client:
            found[dtype] = compare(model, client, dtype, steps, rounds)
        rows: list[dict[str, object]] = []
        for label, timed, target in zip(
            ("1", f"{TOGETHER}"), found[dtype], (HTTP_TARGET, TOGETHER_TARGET), strict=True
        ):
            for way in ("diffusers", "HTTP"):
                over = timed.ratio(way, "diffusers")
                row = {"requests": label, "through": way, "ms": timed.time(way).times(1000), "over diffusers": over}
                rows.append(row | {"target": target if way == "HTTP" else ""})
        report.table(f"{MODEL}, {dtype} on both sides, {steps} steps, guided, {given.threads} threads", rows)
    if given.soak:
        with server(given.threads, given.dtypes[0]) as (url, pid):
            soak = soaked(url, pid, given.soak * 60, (MODEL, "shapes-dit"))
        report.table(f"Soak of {given.soak:g} minutes, mixed load with departures and nonsense", soak)

    def draw_figure(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (dtype, (single, many)) in enumerate(found.items()):
            for j, (label, timed) in enumerate((("1 request", single), (f"{TOGETHER} requests", many))):
                height = timed.ratio("HTTP", "diffusers").median
                axes.bar(2.5 * i + j, height, 0.9, color=f"C{j}")
                axes.text(2.5 * i + j, height, f"{label}\n{dtype}\n{height:.2f}", ha="center", va="bottom", fontsize=8)
        axes.axhline(1.0, color="grey", linewidth=1)
        axes.set_ylabel("time through HTTP over diffusers")
        axes.set_xticks([])
        axes.margins(y=0.25)

    report.save(draw_figure if found else None)
    if any(row["held"] == "NOT" for row in soak):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
