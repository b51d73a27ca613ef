"""Starting trajectories, and running a list of requests as one continuous batch."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from models.backbone import Backbone
from models.beginning import begin, encode
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
    pictures = encode(backbone, run)
    solver = table_for(backbone, run)
    student = None if run.student is None else backbone.applied(run.student, 1.0)
    styles = tuple(backbone.applied(info, scale) for info, scale in run.loras)
    seen = {t.data_ptr(): t.nbytes for row in conditioning.values() if (t := row.get("beside")) is not None}
    trajectories = []
    for i, seed in enumerate(run.seeds):
        generator = torch.Generator("cpu").manual_seed(seed)
        scheduler = run.schedule.fresh()
        begun = begin(backbone, run, i, scheduler, solver, generator, pictures)
        trajectories.append(
            Trajectory(
                state=begun.latents if solver is None else first_state(begun.latents, solver.registers),
                steps=run.steps,
                scheduler=scheduler,
                timesteps=run.schedule.timesteps,
                times=run.schedule.times,
                table=solver,
                conditioning={role: {**row, **begun.beside} for role, row in conditioning.items()},
                guidance=backbone.family.guidance,
                scales=run.scales,
                generator=generator,
                step_options=takes(scheduler.__class__),
                kind=kind,
                outside=begun.outside,
                student=student,
                styles=styles,
                controls=pictures.controls,
                kept_bytes=begun.kept_bytes + sum(seen.values()),
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


def decode(backbone: Backbone, latents: Sequence[Tensor]) -> Tensor:
    """Latents [1, channels, h, w] of one shape, of any trajectories, as one batch, to pixels [images, h, w, 3]."""
    return backbone.decode(torch.cat(list(latents)))


def finish(backbone: Backbone, run: Run, trajectories: Sequence[Trajectory]) -> Result:
    """Decode the finished trajectories of one run."""
    latents = torch.cat([trajectory.latents for trajectory in trajectories])
    pictures = to_pictures(backbone.decode(latents))
    ran = [effective_steps(trajectory) for trajectory in trajectories] if any(t.ran for t in trajectories) else None
    return Result(pictures, latents, run.seeds, run.accelerators, usage(backbone, run, ran), run.profile)
