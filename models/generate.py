"""Starting trajectories, and running a list of requests as one continuous batch."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from models.backbone import Backbone
from models.costs.macs import usage
from models.denoise import advance
from models.request import Request, Result, Run
from models.resolve import resolve
from models.solvers.batched import first_state
from models.solvers.names import takes
from models.solvers.tables import NotLinear, Table, table
from models.trajectory import Trajectory, effective_steps

Progress = Callable[[int, int], None]
"""Called after every tick with (steps done, steps in all) over all requests."""


def generate(
    backbone: Backbone, requests: Sequence[Request], *, max_rows: int = 64, progress: Progress | None = None
) -> list[Result]:
    """Run requests with any mix of accelerators, steps, scales, schedulers and sizes as one continuous batch.

    Up to `max_rows` rows share a forward; latents of different shape take turns. All requests are checked before the
    first forward. Without acceleration the pictures are those of the diffusers pipeline.
    """
    runs = [resolve(backbone.spec, backbone.scheduler_config, request) for request in requests]
    started = [start(backbone, run) for run in runs]
    groups: OrderedDict[Hashable, deque[Trajectory]] = OrderedDict()
    for trajectory in (t for trajectories in started for t in trajectories):
        groups.setdefault(trajectory.group, deque()).append(trajectory)
    total = sum(t.num_steps for trajectories in started for t in trajectories)
    while groups:
        group, waiting = groups.popitem(last=False)
        tick = take(waiting, max_rows)
        advance(backbone, tick)
        waiting.extend(t for t in tick if not t.done)
        if waiting:
            groups[group] = waiting
        done = sum(t.step for trajectories in started for t in trajectories)
        if progress is not None:
            progress(done, total)
    return [finish(backbone, run, trajectories) for run, trajectories in zip(runs, started, strict=True)]


def take(waiting: deque[Trajectory], max_rows: int) -> list[Trajectory]:
    """Take trajectories from the head of the line, at least one, while their rows fit."""
    tick = [waiting.popleft()]
    rows = tick[0].num_rows
    while waiting and rows + waiting[0].num_rows <= max_rows:
        rows += waiting[0].num_rows
        tick.append(waiting.popleft())
    return tick


@torch.inference_mode()
def start(backbone: Backbone, run: Run) -> list[Trajectory]:
    """The trajectories of a run, one an image, at their first step."""
    conditioning = backbone.conditioner.of(run)
    return [_trajectory(backbone, run, i, conditioning) for i in range(len(run.seeds))]


def _trajectory(backbone: Backbone, run: Run, i: int, conditioning: dict) -> Trajectory:  # type: ignore[type-arg]
    generator = torch.Generator("cpu").manual_seed(run.seeds[i])
    scheduler, solver = run.schedule.fresh(), table_for(backbone, run)
    latents = _first_latents(backbone, run, i, scheduler, solver, generator)
    return Trajectory(
        state=latents if solver is None else first_state(latents, solver.registers),
        steps=run.steps,
        scheduler=scheduler,
        timesteps=run.schedule.timesteps,
        times=run.schedule.times,
        conditioning=conditioning,
        guidance_scale=run.guidance_scale,
        generator=generator,
        step_options=takes(scheduler.__class__),
        table=solver,
        lora=backbone.loras[run.adapter] if run.adapter is not None else None,
    )


def table_for(backbone: Backbone, run: Run) -> Table | None:
    """The table that a run's scheduler is followed by; None where it takes its own steps."""
    if backbone.stepping == "exact":
        return None
    try:
        return table(run.schedule)
    except NotLinear:
        return None


def _first_latents(
    backbone: Backbone, run: Run, i: int, scheduler: Any, solver: Table | None, generator: torch.Generator
) -> Tensor:
    """Noise, or a picture with noise on it, [1, channels, h, w]: in float32 where a table is followed."""
    scale = backbone.spec.latent_scale
    shape = (1, backbone.spec.latent_channels, run.height // scale, run.width // scale)
    request, device = run.request, backbone.device
    dtype = backbone.dtype if solver is None else backbone.latent_dtype
    encoded = None
    if request.image is not None:
        encoded = backbone.encode(request.image, run.width, run.height, generator)
    if request.latents is not None:
        noise = request.latents[i : i + 1].to(device, dtype)
    else:
        noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    if encoded is not None:
        if solver is not None:
            kept, added = solver.add_noise
            return kept * encoded.to(dtype) + added * noise
        return scheduler.add_noise(encoded, noise, run.schedule.timesteps[:1])  # type: ignore[no-any-return]
    return noise * scheduler.init_noise_sigma  # type: ignore[no-any-return]


def decode(backbone: Backbone, latents: Sequence[Tensor]) -> list[Image.Image]:
    """Decode latents [1, channels, h, w] of one shape, of any trajectories, as one batch."""
    return backbone.decode(torch.cat(list(latents)))


def finish(backbone: Backbone, run: Run, trajectories: Sequence[Trajectory]) -> Result:
    """Decode the finished trajectories of one run."""
    latents = torch.cat([trajectory.latents for trajectory in trajectories])
    ran = [effective_steps(trajectory) for trajectory in trajectories] if any(t.ran for t in trajectories) else None
    return Result(backbone.decode(latents), latents, run.seeds, run.accelerators, usage(backbone, run, ran))
