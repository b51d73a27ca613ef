"""The denoising state of one image, from noise to final latents."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.guidance import guided
from models.reuse.plans import ROLES, Role, StepRows
from models.reuse.rows import Conditioning, Row
from models.reuse.store import Memory

if TYPE_CHECKING:
    from models.adapters.lora import Lora


@dataclass(eq=False)
class Trajectory:
    """Latents [1, channels, h, w] on their way, with everything that belongs to them alone.

    `steps` says what each evaluation does; `timesteps` are the scheduler's, on the CPU. `group` is equal for
    trajectories that can share a forward.
    """

    latents: Tensor
    steps: tuple[StepRows, ...]
    scheduler: Any
    timesteps: Tensor
    conditioning: dict[Role, Conditioning]
    guidance_scale: float
    generator: torch.Generator
    step_options: Mapping[str, Any]
    lora: Lora | None = None
    step: int = 0
    watched: bool = False  # keep what `preview` needs
    _seen: tuple[Tensor, Tensor, float] | None = None
    memory: dict[Role, Memory] = field(default_factory=lambda: {role: Memory() for role in ROLES})
    group: Hashable = field(init=False)

    def __post_init__(self) -> None:
        shapes = tuple((name, tuple(t.shape)) for name, t in self.conditioning["conditional"].items())
        self.group = (tuple(self.latents.shape), shapes)

    @property
    def num_steps(self) -> int:
        """Evaluations of the whole run."""
        return len(self.steps)

    @property
    def done(self) -> bool:
        """Whether the latents are final."""
        return self.step >= len(self.steps)

    @property
    def plan(self) -> StepRows:
        """The rows of the coming step."""
        return self.steps[self.step]

    @property
    def num_rows(self) -> int:
        """How many rows the coming step takes."""
        return self.plan.num_rows

    @property
    def timestep(self) -> Tensor:
        """The time of the coming step, a 0-dim CPU tensor."""
        return self.timesteps[self.step]

    def rows(self) -> list[Row]:
        """The rows of the coming step; what they remember is in this trajectory's memory."""
        plans = {"conditional": self.plan.conditional, "unconditional": self.plan.unconditional}
        return [
            Row(plan, role, self, self.memory[role], self.lora if plan.adapter is not None else None)
            for role in ROLES
            if (plan := plans[role]) is not None
        ]

    def model_input(self) -> Tensor:
        """The latents as the backbone wants them at this time."""
        scaled: Tensor = self.scheduler.scale_model_input(self.latents, self.timestep)
        return scaled

    def advance(self, conditional: Tensor, unconditional: Tensor | None) -> None:
        """Take one scheduler step along the prediction and forget what no later step wants."""
        plan = self.plan
        self.follow(conditional, unconditional)
        for role, row in (("conditional", plan.conditional), ("unconditional", plan.unconditional)):
            if row is not None:
                self.memory[role].forget(row.drop)  # type: ignore[index]

    def follow(self, conditional: Tensor, unconditional: Tensor | None) -> None:
        """Take one scheduler step along the prediction."""
        prediction = guided(conditional, unconditional, self.guidance_scale)
        if prediction.shape[1] != self.latents.shape[1]:
            prediction = prediction.chunk(2, dim=1)[0]  # learned variance, which these schedulers do not use
        if self.watched:
            self._seen = (self.model_input(), prediction, float(self.timestep))
        options = {"generator": self.generator} if "generator" in self.step_options else {}
        self.latents = self.scheduler.step(
            prediction, self.timestep, self.latents, **{**self.step_options, **options}, return_dict=False
        )[0]
        self.step += 1

    def preview(self) -> Tensor:
        """The clean latents that the last step's prediction points to, [1, channels, h, w]; `watched` runs only."""
        if self._seen is None:
            return self.latents
        x, prediction, t = self._seen
        signal = self.scheduler.alphas_cumprod[round(t)].float() ** 0.5
        noise = (1 - signal**2) ** 0.5
        kind = self.scheduler.config.prediction_type
        if kind == "v_prediction":
            return signal * x - noise * prediction  # type: ignore[no-any-return]
        if kind == "sample":
            return prediction
        return (x - noise * prediction) / signal.clamp(min=1e-3)  # type: ignore[no-any-return]

    def finite(self) -> bool:
        """Whether the latents are numbers. Waits for the device: ask once, at the end."""
        return bool(torch.isfinite(self.latents).all())

    def memory_bytes(self) -> int:
        """Bytes of remembered features."""
        return sum(memory.nbytes for memory in self.memory.values())
