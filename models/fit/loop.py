"""The training loop every stage shares: learning-rate schedule, moving average, checkpoints, progress, previews."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models.fit import checkpoint
from models.fit.progress import Progress


class Task(Protocol):
    """What a stage gives to the loop."""

    @property
    def name(self) -> str: ...

    @property
    def module(self) -> nn.Module: ...

    def optimizers(self) -> Sequence[Optimizer]:
        """Fresh optimizers whose learning rates are the peak ones."""
        ...

    def loss(self, generator: torch.Generator) -> Tensor:
        """The scalar loss of one fresh batch; `generator` (CPU) is the only source of chance."""
        ...

    def preview(self, folder: Path, step: int) -> str:
        """Write sample pictures to `folder` with the module as it is, and say in a few words how good they are."""
        ...


@dataclass(frozen=True)
class Options:
    """How long and how a stage trains. `minutes`, when set, replaces `steps` as the budget."""

    folder: Path
    steps: int
    minutes: float | None = None
    seed: int = 0
    warmup: int = 100
    decay_share: float = 0.4
    ema_decay: float = 0.999
    clip: float = 1.0
    autocast: bool = False
    checkpoint_seconds: float = 120.0
    preview_seconds: float = 600.0

    def share_done(self, step: int, seconds: float) -> float:
        """How much of the budget is spent, from 0 to 1."""
        return min(1.0, seconds / (60 * self.minutes) if self.minutes is not None else step / self.steps)

    def rate(self, step: int, share: float) -> float:
        """The learning rate as a part of its peak: warm-up, plateau, then a straight line to zero."""
        return min(1.0, (step + 1) / self.warmup, (1.0 - share) / self.decay_share)


def fit(task: Task, options: Options) -> None:
    """Train `task` to the end of its budget, resuming from its checkpoint; the module ends as its moving average."""
    device = next(task.module.parameters()).device
    optimizers = task.optimizers()
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    ema = {name: value.detach().clone() for name, value in task.module.state_dict().items()}
    path = options.folder / f"{task.name}.safetensors"
    state = {"step": 0, "seconds": 0.0}
    if path.exists():
        state = checkpoint.load(path, task.module, ema, optimizers)
    step, seconds = int(state["step"]), float(state["seconds"])
    saved = previewed = seconds
    parameters = [parameter for parameter in task.module.parameters() if parameter.requires_grad]
    generator = torch.Generator()
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.autocast)
    task.module.train()
    with Progress(task.name) as progress:
        while (share := options.share_done(step, seconds)) < 1.0:
            started = time.perf_counter()
            generator.manual_seed(options.seed * 1_000_003 + step)
            _set_rates(optimizers, peaks, options.rate(step, share))
            with autocast:
                loss = task.loss(generator)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, options.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            _update_ema(ema, task.module, min(options.ema_decay, (1 + step) / (10 + step)))
            step += 1
            seconds += time.perf_counter() - started
            progress.update(step, options.share_done(step, seconds), seconds, loss)
            if seconds - saved > options.checkpoint_seconds:
                checkpoint.save(path, task.module, ema, optimizers, {"step": step, "seconds": seconds})
                saved = seconds
            if seconds - previewed > options.preview_seconds:
                with autocast:
                    progress.say(f"step {step}: {_preview(task, ema, options.folder, step)}")
                previewed = seconds
        if seconds > saved or not path.exists():
            checkpoint.save(path, task.module, ema, optimizers, {"step": step, "seconds": seconds})
        task.module.load_state_dict(ema)
        task.module.eval()
        with autocast:
            progress.say(f"done at step {step}: {task.preview(options.folder, step)}")


def _set_rates(optimizers: Sequence[Optimizer], peaks: list[list[float]], factor: float) -> None:
    for optimizer, rates in zip(optimizers, peaks, strict=True):
        for group, peak in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = peak * factor


@torch.no_grad()
def _update_ema(ema: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    names = [name for name, value in ema.items() if value.is_floating_point()]
    current = module.state_dict()
    torch._foreach_lerp_([ema[name] for name in names], [current[name] for name in names], 1.0 - decay)


def _preview(task: Task, ema: dict[str, Tensor], folder: Path, step: int) -> str:
    """The task's preview with the moving average in place of the weights."""
    weights = {name: value.clone() for name, value in task.module.state_dict().items()}
    task.module.load_state_dict(ema)
    task.module.eval()
    try:
        return task.preview(folder, step)
    finally:
        task.module.load_state_dict(weights)
        task.module.train()
