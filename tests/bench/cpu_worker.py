"""One process of `bench_cpu`: loads models under its settings, then times what each line of standard input asks for.

A line is "MODEL WORK COUNT", WORK being `tick` (COUNT guided images, one step) or `decode` (COUNT images); the answer
is one line with the seconds it took.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import cache
from threading import Thread

import torch

import models
from models import advance
from tests.bench import zoo
from tests.bench.harness import elapsed, quiet
from tests.bench.runs import request, trajectories
from tests.bench.zoo import Model


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--network-format", default="contiguous")
    parser.add_argument("--vae-format", default="contiguous")
    parser.add_argument("--vae-dtype", default="")
    given = parser.parse_args()
    quiet()
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

    @cache
    def model(name: str) -> Model:
        known = zoo.place(name)
        backbone = models.load(str(known), device="cpu", dtype=given.dtype)
        if hasattr(backbone.network.module, "conv_in"):
            backbone.network.module.to(memory_format=formats[given.network_format])  # type: ignore[call-overload]
        if given.vae_dtype:
            backbone.parts.vae.to(getattr(torch, given.vae_dtype))
        backbone.parts.vae.to(memory_format=formats[given.vae_format])
        return Model(name, known, backbone, bundled=False)

    @cache
    def work(name: str, kind: str, count: int) -> Callable[[], object]:
        loaded = model(name)
        running = trajectories(loaded, [request(loaded, 900, seed=i) for i in range(count)])
        if kind == "tick":
            return lambda: advance(loaded.backbone, running)
        latents = torch.cat([trajectory.latents for trajectory in running])
        return lambda: loaded.backbone.decode(latents)

    def answer() -> None:
        if given.threads:
            torch.set_num_threads(given.threads)
        print("ready", flush=True)
        for line in sys.stdin:
            name, kind, count = line.split()
            print(elapsed(work(name, kind, int(count))), flush=True)

    thread = Thread(target=answer)  # as the engine's: glibc gives it another arena than the main thread
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
