"""The denoising state of one image, from noise to final latents."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from models.guidance import CONDITIONAL, Guidance, Scales
from models.reuse.gates import GateState
from models.reuse.plans import Role, RowPlan, StepRows
from models.reuse.rows import Conditioning, Row, RowControl
from models.reuse.store import Memory
from models.reuse.turns import Turn, settled

if TYPE_CHECKING:
    from models.adapters.lora import Applied
    from models.masks import Outside
    from models.solvers.tables import Table

Decision = Literal["skipped", "computed"]
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
    `gate` is the state of its gate, and `ran` what the steps did that a gate had a part in.
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
    outside: Outside | None = None  # with a mask: what its latents are outside of it
    student: Applied | None = None
    styles: tuple[Applied, ...] = ()
    controls: tuple[tuple[RowControl, ...], ...] = ()  # by step, what steers its rows; empty: nothing ever does
    kept_bytes: int = 0  # of what a mask and control networks need until the end
    step: int = 0
    watched: bool = False  # keep what `preview` needs
    foreseen: Tensor | None = None  # the clean latents that the last prediction points to; `watched` runs only
    gate: GateState = field(default_factory=GateState)
    turn: Turn | None = None  # the coming step's, once its rows were asked for
    ran: dict[int, StepRows] = field(default_factory=dict)
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
        return self._by_owner(self.plan)

    def _by_owner(self, plan: StepRows) -> dict[Owner, RowPlan]:
        found = {role: plan.conditional if role == CONDITIONAL else plan.unconditional for role in self.guidance.roles}
        return {owner: row for owner, row in (found | {OUTPUT: plan.output}).items() if row is not None}

    def rows(self) -> list[Row]:
        """The rows of the coming step; what they remember is in this trajectory's memory."""
        if self.turn is None and self.plan.gated:
            self.turn = Turn(self.gate, self.step)
        controls = self.controls[self.step] if self.controls else ()
        return [
            Row(plan, role, self, self.memory[role], self._adapters(plan), self.turn, controls)
            for role, plan in self.plans().items()
            if role != OUTPUT
        ]

    def _adapters(self, plan: RowPlan) -> tuple[Applied, ...]:
        """A student where the plan asks for it; styles in every row."""
        if plan.adapter is None or self.student is None:
            return self.styles
        return (self.student, *self.styles)

    def moved(self, state: Tensor) -> None:
        """Take the next state, and forget what no later step wants."""
        plan = self.plan
        if self.turn is not None:
            plan = self.ran[self.step] = self._settled(self.turn)
            self.gate, self.turn = self.turn.after, None
        for owner, row in self._by_owner(plan).items():
            self.memory[owner].forget(row.drop)
        self.state = state
        self.step += 1

    def _settled(self, turn: Turn) -> StepRows:
        conditional, unconditional = (
            row and settled(row, turn) for row in (self.plan.conditional, self.plan.unconditional)
        )
        return replace(self.plan, conditional=conditional, unconditional=unconditional)

    def preview(self) -> Tensor:
        """The clean latents that the last step's prediction points to, [1, channels, h, w]; `watched` runs only."""
        return self.latents if self.foreseen is None else self.foreseen

    def finite(self) -> bool:
        """Whether the latents are numbers. Waits for the device: ask once, at the end."""
        return bool(torch.isfinite(self.latents).all())

    def memory_bytes(self) -> int:
        """Bytes of remembered features, and of what else is kept."""
        return self.kept_bytes + sum(memory.nbytes for memory in self.memory.values())


def effective_steps(trajectory: Trajectory) -> tuple[StepRows, ...]:
    """Every step as it really ran, or will where no gate decides; a gate that is still to decide skips nothing."""
    if not trajectory.ran:
        return trajectory.steps
    return tuple(trajectory.ran.get(i, step) for i, step in enumerate(trajectory.steps))


def decided(trajectory: Trajectory, step: int) -> Decision | None:
    """What its gate decided in a step that was taken; None where it had no choice, or no part in it."""
    ran = trajectory.ran.get(step)
    for plan, did in zip(trajectory.steps[step], ran or (), strict=ran is not None):
        if plan.gating is not None and not plan.gating.forced:
            return "skipped" if plan.gating.site in did.reads else "computed"  # a pair decides once
    return None


def decisions(trajectory: Trajectory) -> dict[Decision, int]:
    """How often its gate decided what so far; steps in which it had no choice are not counted."""
    counts: dict[Decision, int] = {"skipped": 0, "computed": 0}
    for step in trajectory.ran:
        if (decision := decided(trajectory, step)) is not None:
            counts[decision] += 1
    return counts
