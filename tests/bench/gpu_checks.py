"""What only a GPU can show: host synchronisations in a tick, what launching costs, what compiling brings."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from models import advance
from models.device import wait
from models.trajectory import Trajectory
from tests.bench.harness import Contender, elapsed, race
from tests.bench.runs import accelerations, request, trajectories
from tests.bench.zoo import Model

SYNCHRONISING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")


def timed(model: Model, run: Contender) -> Callable[[], None]:
    """The same, waiting for the device at the end."""

    def done() -> None:
        run()
        wait(model.backbone.device)

    return done


def running(model: Model, images: int, steps: int = 500) -> list[Trajectory]:
    """Plain guided images past their first step."""
    found = trajectories(model, [request(model, steps, seed=i) for i in range(images)])
    advance(model.backbone, found)
    return found


def synchronisations(model: Model) -> dict[str, object]:
    """Host synchronisations in a mixed tick: by torch's own check, and counted by the profiler."""
    steps = 8
    chosen = list(accelerations(model, steps).values())
    mixed = trajectories(model, [request(model, steps, a, seed=i) for i, a in enumerate(chosen)])
    for _ in range(2):
        advance(model.backbone, mixed)
    verdict = "not checked: no CUDA"
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
        try:
            advance(model.backbone, mixed)
            verdict = "none"
        except RuntimeError as error:
            verdict = str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]

    def counted(run: Contender) -> int:
        with profile(activities=activities) as profiled:
            run()
        return sum(e.count for e in profiled.key_averages() if any(name in e.key for name in SYNCHRONISING))

    seen = counted(partial(advance, model.backbone, mixed)) - counted(lambda: None)  # the profiler waits once itself
    return {"model": model.name, "plans": len(chosen), "torch's check": verdict, "seen by the profiler": seen}


def compiled(model: Model, images: int) -> dict[str, object]:
    """A tick before and after regional compilation, which cannot be undone: the last thing done with a model."""
    step = timed(model, partial(advance, model.backbone, running(model, images)))
    step()
    eager = statistics.median(elapsed(step) for _ in range(10))
    model.backbone.network.module.compile_repeated_blocks(dynamic=True)  # type: ignore[operator]
    first = elapsed(step)
    step()
    after = statistics.median(elapsed(step) for _ in range(10))
    return {"model": model.name, "rows": 2 * images, "compiled over eager": after / eager, "s of compiling": first}


def graphed(model: Model) -> dict[str, object]:
    """One plain forward of a guided pair, launched operator by operator and as one CUDA graph: what launching costs."""
    rows = [(row, trajectory) for trajectory in running(model, 1) for row in trajectory.rows()]
    x = torch.cat([trajectory.latents for _, trajectory in rows]).to(model.backbone.dtype)
    t = torch.full((len(rows),), 500.0, device=x.device)
    parts = [trajectory.conditioning[row.role] for row, trajectory in rows]
    conditioning = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    bare = partial(model.backbone.forward, x, t, conditioning, [row for row, _ in rows])
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(3):
            bare()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bare()
    result = race({"eager": timed(model, bare), "graph": timed(model, graph.replay)}, 20)
    return {
        "model": model.name,
        "ms eager": result.time("eager").times(1000),
        "graph over eager": result.ratio("graph", "eager"),
    }
