"""The denoising state of one image, from noise to final latents."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.guidance import CONDITIONAL, Guidance, Scales
from models.reuse.plans import Role, RowPlan, StepRows
from models.reuse.rows import Conditioning, Row
from models.reuse.store import Memory

if TYPE_CHECKING:
    from models.adapters.lora import Lora
    from models.solvers.tables import Table

Owner = Role
OUTPUT: Owner = "output"
"""Whose memory: that of a row, by its role, or the trajectory's own, which is of its predictions."""


@dataclass(eq=False)
class Trajectory:
    """One image on its way, with everything that belongs to it alone.

    `state` [registers, channels, h, w] begins with the latents; the rest is what a multistep method keeps, where the
    scheduler is followed by its `table`. Without one there is a single register, and `scheduler` steps it and keeps its
    own history. `steps` says what each evaluation does; `timesteps` are the scheduler's, on the CPU, and `times` the
    same as plain numbers. `group` is equal for trajectories that can share a forward: of one shape, and of one `kind`.
    """

    state: Tensor
    steps: tuple[StepRows, ...]
    scheduler: Any
    timesteps: Tensor
    times: Sequence[float]
    conditioning: dict[Role, Conditioning]
    guidance: Guidance
    scales: Scales
    generator: torch.Generator
    step_options: Mapping[str, Any]
    table: Table | None = None
    kind: Hashable = ()
    lora: Lora | None = None
    step: int = 0
    watched: bool = False  # keep what `preview` needs
    foreseen: Tensor | None = None  # the clean latents that the last prediction points to; `watched` runs only
    memory: dict[Owner, Memory] = field(init=False)
    group: Hashable = field(init=False)

    def __post_init__(self) -> None:
        self.memory = {owner: Memory() for owner in (*self.guidance.roles, OUTPUT)}
        self.group = (tuple(self.state.shape[1:]), self.kind)

    @property
    def latents(self) -> Tensor:
        """The latents [1, channels, h, w]."""
        return self.state if len(self.state) == 1 else self.state[:1]

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
    def time(self) -> float:
        """The time of the coming step."""
        return self.times[self.step]

    @property
    def timestep(self) -> Tensor:
        """The time of the coming step, a 0-dim CPU tensor."""
        return self.timesteps[self.step]

    def plans(self) -> dict[Owner, RowPlan]:
        """What the rows of the coming step do, and what the trajectory does with its prediction."""
        plan = self.plan
        found = {role: plan.conditional if role == CONDITIONAL else plan.unconditional for role in self.guidance.roles}
        return {owner: row for owner, row in (found | {OUTPUT: plan.output}).items() if row is not None}

    def rows(self) -> list[Row]:
        """The rows of the coming step; what they remember is in this trajectory's memory."""
        return [
            Row(plan, role, self, self.memory[role], self.lora if plan.adapter is not None else None)
            for role, plan in self.plans().items()
            if role != OUTPUT
        ]

    def moved(self, state: Tensor) -> None:
        """Take the next state, and forget what no later step wants."""
        for owner, plan in self.plans().items():
            self.memory[owner].forget(plan.drop)
        self.state = state
        self.step += 1

    def preview(self) -> Tensor:
        """The clean latents that the last step's prediction points to, [1, channels, h, w]; `watched` runs only."""
        return self.latents if self.foreseen is None else self.foreseen

    def finite(self) -> bool:
        """Whether the latents are numbers. Waits for the device: ask once, at the end."""
        return bool(torch.isfinite(self.latents).all())

    def memory_bytes(self) -> int:
        """Bytes of remembered features."""
        return sum(memory.nbytes for memory in self.memory.values())
