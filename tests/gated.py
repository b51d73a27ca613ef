"""Accelerators for tests of gates: one that asks a gate, and one that skips the steps it is told."""

from __future__ import annotations

from typing import ClassVar

from models.accelerators.base import Accelerator
from models.reuse.gates import Gate
from models.reuse.plans import Gated, Recall, StepPlan
from models.reuse.sites import Site

NEVER, ALWAYS = 0.0, 1e9
"""Thresholds under which no change ever lies, and every change."""


class AskGate(Accelerator):
    """`site` by `rule` in every step but those in `plain`."""

    mode: str = "ask_gate"
    site: Site
    rule: Gate
    order: int = 0
    plain: frozenset[int] = frozenset()
    claims: ClassVar[frozenset[str]] = frozenset({"gate"})

    def plan(self, step: int, num_steps: int) -> StepPlan:
        """The gate, or nothing."""
        return StepPlan({} if step in self.plain else {self.site: Gated(self.rule, Recall(self.order))})


class Skip(Accelerator):
    """`site` is recalled in the steps that are `skipped`."""

    mode: str = "skip"
    site: Site
    skipped: frozenset[int]
    order: int = 0

    def plan(self, step: int, num_steps: int) -> StepPlan:
        """A recall, or nothing."""
        return StepPlan({self.site: Recall(self.order)} if step in self.skipped else {})
