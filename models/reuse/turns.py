"""Gates over a run: which steps they decide, what was decided in one of them, and what its rows then do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from models.reuse.gates import Change, GateState, decide, distance
from models.reuse.plans import Entry, Gated, Gating, Reading, Role, RowPlan, StepPlan, StepRows
from models.reuse.sites import OUTPUT, Feature, Site, Sites, contains, disjoint
from models.reuse.weights import BASES


def gate_of(sites: Sites, plans: Sequence[StepPlan]) -> tuple[Site, Gated] | None:
    """The gated site of a run. Raises `ValueError` where there are two, or where others depend on what it decides.

    All other sites that the run reuses must lie apart from the gated one, or around it: what lies inside might be read
    before it was ever computed.
    """
    gates = {(site, asked): None for plan in plans for site, asked in plan.reuse.items() if isinstance(asked, Gated)}
    if not gates:
        return None
    if len(gates) > 1:
        (one, _), (other, _) = list(gates)[:2]
        raise ValueError(f"gated {one} and gated {other}: a run has one gate")
    [(site, gated)] = gates
    span = sites.span(site)
    for other in dict.fromkeys(other for plan in plans for other in plan.reuse):
        around = other == OUTPUT or (contains(sites.span(other), span) and sites.span(other) != span)
        if other != site and not (around or disjoint(sites.span(other), span)):
            raise ValueError(f"{other} depends on what gated {site} decides")
    for plan in plans:
        if not isinstance(asked := plan.reuse.get(site, gated), Gated):
            raise ValueError(f"{site}: gated in some steps, {asked.name} in others")
    return site, gated


def with_gate(
    sites: Sites,
    gate: tuple[Site, Gated],
    rows: Sequence[RowPlan | None],
    asked: Sequence[bool],
    restarts: frozenset[int],
) -> list[RowPlan | None]:
    """The plans of one row with its gate's part in them; `asked` are the steps in which the gate is to decide, of which
    no restart is one."""
    site, gated = gate
    feature = Feature(site, sites.remembers(site))
    found: list[Gating | None] = []
    known = False
    for step, (row, wanted) in enumerate(zip(rows, asked, strict=True)):
        restart = step in restarts
        if row is None or any(contains(sites.span(outer), sites.span(site)) for outer in row.reads):
            found.append(None)
            continue
        forced = not wanted or not known or step < gated.rule.warmup
        known = True
        found.append(Gating(site, feature, gated, forced, restart))
    last = max((step for step, gating in enumerate(found) if gating and not gating.forced), default=-1)
    return [
        row and replace(row, gating=replace(gating, last=step == last) if gating and step <= last else None)
        for step, (row, gating) in enumerate(zip(rows, found, strict=True))
    ]


@dataclass(eq=False, slots=True)
class Turn:
    """One step of one trajectory's gate; its rows share it.

    What is decided once stands: a step that failed and is tried again does the same, whoever is in its batch then.
    """

    before: GateState
    step: int
    skip: bool | None = None
    """None until it is decided."""
    after: GateState = field(default_factory=GateState)

    def force(self, gating: Gating) -> None:
        """Have the site computed."""
        self._take(gating, *decide(gating.gated.rule, self.before, None))

    def ask(self, gating: Gating, changes: Sequence[Change]) -> None:
        """Let the rule decide on what its rows measured."""
        rule = gating.gated.rule
        self._take(gating, *decide(rule, self.before, distance(rule, changes)))

    def _take(self, gating: Gating, skip: bool, after: GateState) -> None:
        if not skip:
            earlier = () if gating.restart else self.before.computed
            after = replace(after, computed=(self.step, *earlier)[: gating.gated.recall.order + 1])
        self.skip, self.after = skip, after


def settled(plan: RowPlan, turn: Turn) -> RowPlan:
    """What a row really does: its plan once its gate has decided."""
    gating = plan.gating
    if gating is None:
        return plan
    reads, keep, drop = plan.reads, plan.keep, plan.drop
    if turn.skip:
        steps = turn.before.computed
        recall = gating.gated.recall
        entries = tuple((gating.feature, step) for step in steps)
        reading = Reading(recall, entries, BASES[recall.basis](steps, plan.step))
        reads = {**reads, gating.site: reading}
    elif not gating.last:
        keep = keep | {gating.feature}
    if gating.last:
        drop = (*drop, gating.probe, *((gating.feature, step) for step in turn.before.computed))
    return replace(plan, reads=reads, keep=keep, drop=drop, gating=None)


def replaced(gating: Gating, turn: Turn, held: Sequence[Entry]) -> list[Entry]:
    """The entries held that the step's own will stand in for: they are forgotten first, so that no more is ever held
    than the gate may read."""
    if gating.last:
        return []
    return [entry for entry in held if entry[0] == gating.feature and entry[1] not in turn.after.computed]


def most_entries(steps: Sequence[StepRows], role: Role) -> list[tuple[Gating | None, int]]:
    """In every step, the entries of its gated site that a row holds where it computes all that it may."""
    found: list[tuple[Gating | None, int]] = []
    held: Gating | None = None
    count = 0
    for step in steps:
        plan = step.conditional if role == "conditional" else step.unconditional
        gating = None if plan is None else plan.gating
        if gating is not None and not gating.last:
            held, count = gating, 1 if gating.restart else min(count + 1, gating.gated.recall.order + 1)
        found.append((held, count))
        if gating is not None and gating.last:
            held, count = None, 0
    return found
