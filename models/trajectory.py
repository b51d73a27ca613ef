"""The denoising state of one image, from noise to final latents."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.guidance import CONDITIONAL, Guidance, Scales
from models.plan import Role, StepRows
from models.rows import Conditioning, Memory, Row, memory_bytes

if TYPE_CHECKING:
    from models.adapters.lora import Lora


@dataclass(eq=False)
class Trajectory:
    """Latents [1, channels, h, w] on their way, with everything that belongs to them alone.

    `steps` says what each evaluation does; `timesteps` are the scheduler's, on the CPU. `group` is equal for
    trajectories that can share a forward: of the same shape, and of one `kind`.
    """

    latents: Tensor
    steps: tuple[StepRows, ...]
    scheduler: Any
    timesteps: Tensor
    conditioning: dict[Role, Conditioning]
    guidance: Guidance
    scales: Scales
    generator: torch.Generator
    step_options: Mapping[str, Any]
    kind: Hashable = ()
    lora: Lora | None = None
    step: int = 0
    watched: bool = False  # keep what `preview` needs
    _seen: tuple[Tensor, Tensor, float] | None = None
    memory: dict[Role, Memory] = field(init=False)
    group: Hashable = field(init=False)

    def __post_init__(self) -> None:
        self.memory = {role: {} for role in self.guidance.roles}
        self.group = (tuple(self.latents.shape), self.kind)

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
        """The rows of the coming step; they write what they remember into this trajectory's memory."""
        plan = self.plan
        rows = [Row(plan.conditional, CONDITIONAL, self, self.memory[CONDITIONAL], self.lora)]
        if plan.unconditional is not None:
            others = (role for role in self.guidance.roles if role != CONDITIONAL)
            rows += [Row(plan.unconditional, role, self, self.memory[role]) for role in others]
        return rows

    def model_input(self) -> Tensor:
        """The latents as the backbone wants them at this time."""
        scaled: Tensor = self.scheduler.scale_model_input(self.latents, self.timestep)
        return scaled

    def advance(self, predictions: Mapping[Role, Tensor]) -> None:
        """Take one scheduler step along the rows' predictions and forget what no later step wants."""
        plan = self.plan
        self.follow(predictions)
        for role, memory in self.memory.items():
            row = plan.conditional if role == CONDITIONAL else plan.unconditional
            if row is not None:
                for key in memory.keys() - row.live:
                    del memory[key]

    def follow(self, predictions: Mapping[Role, Tensor]) -> None:
        """Take one scheduler step along the rows' predictions."""
        prediction = self.guidance.combine(predictions, self.scales)
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
        return memory_bytes(self.memory.values())
