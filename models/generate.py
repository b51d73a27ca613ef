"""Starting trajectories, and running a list of requests as one continuous batch."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from models.backbone import Backbone
from models.costs.macs import usage
from models.denoise import advance
from models.families.vae import to_pictures
from models.request import Request, Result, Run
from models.resolve import resolve
from models.solvers.batched import first_state
from models.solvers.names import takes
from models.solvers.probe import NotLinear
from models.solvers.tables import Table, table
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
    """The trajectories of a run, one an image, at their first step. A picture to start from is encoded once."""
    conditioning = backbone.conditioning(run)
    kind = backbone.group(run)
    picture = run.request.image
    encoded = None if picture is None else backbone.posterior(picture)
    solver = table_for(backbone, run)
    trajectories = []
    for i, seed in enumerate(run.seeds):
        generator = torch.Generator("cpu").manual_seed(seed)
        scheduler = run.schedule.fresh()
        latents = _first_latents(backbone, run, i, scheduler, solver, generator, encoded)
        trajectories.append(
            Trajectory(
                state=latents if solver is None else first_state(latents, solver.registers),
                steps=run.steps,
                scheduler=scheduler,
                timesteps=run.schedule.timesteps,
                times=run.schedule.times,
                table=solver,
                conditioning=conditioning,
                guidance=backbone.family.guidance,
                scales=run.scales,
                generator=generator,
                step_options=takes(scheduler.__class__),
                kind=kind,
                lora=backbone.loras[run.adapter] if run.adapter is not None else None,
            )
        )
    return trajectories


def table_for(backbone: Backbone, run: Run) -> Table | None:
    """The table that a run's scheduler is followed by; None where it takes its own steps."""
    if backbone.stepping == "exact":
        return None
    try:
        return table(run.schedule)
    except NotLinear:
        return None


def _first_latents(
    backbone: Backbone, run: Run, i: int, scheduler: Any, solver: Table | None, generator: torch.Generator, encoded: Any
) -> Tensor:
    """Noise, or the picture's latents with noise on them, in the order in which diffusers draws the two.

    [1, channels, h, w]: in float32 at least where a table is followed.
    """
    scale = backbone.spec.latent_scale
    shape = (1, backbone.spec.latent_channels, run.height // scale, run.width // scale)
    device, dtype = backbone.device, backbone.dtype if solver is None else backbone.latent_dtype
    clean = None if encoded is None else backbone.draw(encoded, generator).to(dtype)
    if run.request.latents is not None:
        noise = run.request.latents[i : i + 1].to(device, dtype)
    else:
        noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    if clean is None:
        return noise * getattr(scheduler, "init_noise_sigma", 1.0)
    signal, sigma = _mixture(scheduler, run.schedule.timesteps[:1], dtype) if solver is None else solver.add_noise
    if backbone.spec.flow is not None:  # in diffusers' order, which settles how the sum lies in memory
        return sigma * noise + signal * clean
    return signal * clean + sigma * noise


def _mixture(scheduler: Any, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `add_noise` weighs samples and noise with at a time [1]: read off it with ones and zeros, on the CPU.

    Given latents on a device, `add_noise` would move the scheduler's tables there, and every step would wait for them.
    """
    one, zero = torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype)
    if hasattr(scheduler, "add_noise"):
        weights = (scheduler.add_noise(*pair, timesteps).reshape(()) for pair in ((one, zero), (zero, one)))
    else:
        weights = (scheduler.scale_noise(a, timesteps, b).reshape(()) for a, b in ((one, zero), (zero, one)))
    signal, sigma = weights
    return signal, sigma


def decode(backbone: Backbone, latents: Sequence[Tensor]) -> Tensor:
    """Latents [1, channels, h, w] of one shape, of any trajectories, as one batch, to pixels [images, h, w, 3]."""
    return backbone.decode(torch.cat(list(latents)))


def finish(backbone: Backbone, run: Run, trajectories: Sequence[Trajectory]) -> Result:
    """Decode the finished trajectories of one run."""
    latents = torch.cat([trajectory.latents for trajectory in trajectories])
    pictures = to_pictures(backbone.decode(latents))
    ran = [effective_steps(trajectory) for trajectory in trajectories] if any(t.ran for t in trajectories) else None
    return Result(pictures, latents, run.seeds, run.accelerators, usage(backbone, run, ran), run.profile)
