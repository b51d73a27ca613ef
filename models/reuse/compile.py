"""From what accelerators ask of every step to what each row does, remembers and forgets: liveness, as in a compiler.

A reading is resolved to the entries it takes, the last k + 1 computed values of its site, so a feature is kept exactly
at the steps that a later reading names and forgotten after the last one. Reading what was never computed is an error
before the first forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

from models.reuse.plans import (
    Entry,
    Gated,
    Reading,
    Recall,
    Reuse,
    Role,
    RowPlan,
    RowReuse,
    Shared,
    StepPlan,
    StepRows,
    Twin,
    Window,
    Zeros,
)
from models.reuse.sites import OUTPUT, Feature, Site, Sites, contains, disjoint
from models.reuse.turns import gate_of, most_entries, with_gate
from models.reuse.weights import BASES, newton

if TYPE_CHECKING:
    from models.accelerators.base import Accelerator

CONDITIONAL, UNCONDITIONAL = "conditional", "unconditional"
View = Mapping[Site, RowReuse]
"""What one row reuses in one step."""
Known = dict[Feature, list[int]]
"""The steps at which each feature was computed so far, newest last."""


def compile_run(
    sites: Sites, accelerators: Sequence[Accelerator], num_steps: int, guided: bool, guides: int = 1
) -> tuple[StepRows, ...]:
    """Every step of a run as row plans.

    A step is one evaluation of the backbone: a two-evaluation scheduler such as Heun has 2n - 1 of them.
    Where guidance comes back after an unguided stretch, both rows take a plain step: the unconditional row has
    nothing to remember yet, and features of different age would be amplified by the guidance scale. A prediction is
    never foretold from values on the other side of such a switch.
    """
    plans = [merge(sites, [a.plan(step, num_steps) for a in accelerators]) for step in range(num_steps)]
    gate = gate_of(sites, plans)
    guidance = [guided and plan.guided is not False for plan in plans]
    for step in range(1, num_steps):
        if guidance[step] and not guidance[step - 1]:
            plans[step] = _refreshed(plans[step])
        if guidance[step] != guidance[step - 1]:
            plans[step] = _computed(plans[step])
    returns = frozenset(step for step in range(1, num_steps) if guidance[step] and not guidance[step - 1])
    computed = [OUTPUT not in plan.reuse for plan in plans]
    views = {
        role: [
            view(plan, role) if runs and (on or role == CONDITIONAL) else None
            for plan, on, runs in zip(plans, guidance, computed, strict=True)
        ]
        for role in (CONDITIONAL, UNCONDITIONAL)
    }
    conditional, unconditional = (_link(sites, asked, returns) for asked in views.values())
    if gate is not None:
        decided = [gate[0] in plan.reuse for plan in plans]
        conditional, unconditional = (
            with_gate(sites, gate, rows, decided, returns) for rows in (conditional, unconditional)
        )
    output = _outputs(sites, plans, guidance)
    return tuple(
        StepRows(
            None if c is None else replace(c, adapter=plan.adapter),
            None if u is None else replace(u, adapter=plan.adapter),
            o,
            guides,
        )
        for plan, c, u, o in zip(plans, conditional, unconditional, output, strict=True)
    )


def merge(sites: Sites, plans: Sequence[StepPlan]) -> StepPlan:
    """Join the plans of several accelerators. Raises `ValueError` where they cannot all be followed."""
    reuse: dict[Site, Reuse] = {}
    for plan in plans:
        for site, asked in plan.reuse.items():
            if site in reuse:
                raise ValueError(f"{site}: two accelerators decide it")
            if asked.name not in sites.understands(site):
                raise ValueError(f"{site}: cannot do {asked.name}")
            reuse[site] = asked
    _check_nested(sites, reuse)
    guided = [plan.guided for plan in plans if plan.guided is not None]
    adapters = [plan.adapter for plan in plans if plan.adapter is not None]
    return StepPlan(reuse, guided[0] if guided else None, adapters[0] if adapters else None)


def _check_nested(sites: Sites, reuse: Iterable[Site]) -> None:
    spans = sorted((sites.span(site), site) for site in reuse)
    for (first, one), (second, other) in pairwise(spans):
        if not (disjoint(first, second) or contains(first, second) or contains(second, first)):
            raise ValueError(f"{one} and {other} overlap")


def _refreshed(plan: StepPlan) -> StepPlan:
    """The same step without reuse of anything remembered."""
    return replace(plan, reuse={site: reuse for site, reuse in plan.reuse.items() if isinstance(reuse, Zeros)})


def _computed(plan: StepPlan) -> StepPlan:
    """The same step with its prediction computed."""
    return replace(plan, reuse={site: reuse for site, reuse in plan.reuse.items() if site != OUTPUT})


def view(plan: StepPlan, role: Role) -> View:
    """What the row with this role reuses in a step, whatever a gate decides."""
    return {site: _of_row(reuse, role) for site, reuse in plan.reuse.items() if _of_row(reuse, role) is not None}  # type: ignore[misc]


def _of_row(reuse: Reuse, role: Role) -> RowReuse | None:
    """What the row with this role does; None: it computes the site in full."""
    if isinstance(reuse, Gated):
        return None
    if isinstance(reuse, Shared):
        return reuse.of if role == CONDITIONAL else Twin(reuse.of)
    return reuse


def row_plan(sites: Sites, view: View, known: Known, step: int) -> RowPlan:
    """What a row does in one step, given what it knows; nothing is kept yet. Raises `KeyError` for a gap in it."""
    reads: dict[Site, Reading] = {}
    for site, reuse in _outermost(sites, view).items():
        wanted = _wanted(sites, site, reuse)
        if wanted is None:
            reads[site] = Reading(reuse)
            continue
        feature, count = wanted
        steps = known.get(feature, [])[-count:][::-1]
        weights = BASES[reuse.basis] if isinstance(reuse, Recall) else newton
        if not steps:
            raise KeyError(f"reused before it was computed: {site} ({feature.kind}) in step {step}")
        reads[site] = Reading(reuse, tuple((feature, s) for s in steps), weights(steps, step))
    return RowPlan(step, reads)


def _outermost(sites: Sites, view: View) -> View:
    """Without the sites that lie inside another one that is not run. Spans are nested or apart."""
    found: dict[Site, RowReuse] = {}
    reach = 0
    for (_, stop), site in sorted(((sites.span(site), site) for site in view), key=lambda one: (one[0][0], -one[0][1])):
        if stop > reach:
            found[site] = view[site]
            if isinstance(view[site], Zeros | Recall):
                reach = stop
    return found


def _wanted(sites: Sites, site: Site, reuse: RowReuse) -> tuple[Feature, int] | None:
    """The feature that a reuse reads, and how many of its last values."""
    if isinstance(reuse, Recall):
        return Feature(site, sites.remembers(site)), reuse.order + 1
    if isinstance(reuse, Window):
        return Feature(site, "residual", reuse.width), 1
    return None


def computes(sites: Sites, reads: Mapping[Site, Reading], feature: Feature) -> bool:
    """Whether a forward that reads these sites has the feature to remember."""
    if (own := reads.get(feature.site)) is not None:
        return feature.kind in own.reuse.leaves
    span = sites.span(feature.site)
    skipped = [sites.span(site) for site, reading in reads.items() if isinstance(reading.reuse, Zeros | Recall)]
    # What is skipped may lie apart, or deeper inside; a site that is run in part has nothing to remember.
    return all(disjoint(other, span) or (contains(span, other) and other != span) for other in skipped)


def _link(sites: Sites, views: Sequence[View | None], restarts: frozenset[int] = frozenset()) -> list[RowPlan | None]:
    """The plans of one row over a run. A step without this row (None) keeps what it has.

    At the steps in `restarts` what was computed before counts no more.
    """
    features = {
        wanted[0] for asked in views for site, reuse in (asked or {}).items() if (wanted := _wanted(sites, site, reuse))
    }
    known: Known = {}
    plans: list[RowPlan | None] = []
    last: dict[Entry, int] = {}
    for step, asked in enumerate(views):
        if step in restarts:
            known.clear()
        if asked is None:
            plans.append(None)
            continue
        plan = row_plan(sites, asked, known, step)
        plans.append(plan)
        last |= {entry: step for reading in plan.reads.values() for entry in reading.entries}
        for feature in features:
            if computes(sites, plan.reads, feature):
                known.setdefault(feature, []).append(step)
    return _remembering(plans, last)


def _remembering(plans: Sequence[RowPlan | None], last: Mapping[Entry, int]) -> list[RowPlan | None]:
    """Fill in what is kept (an entry that some step reads) and dropped (after the last one that does)."""
    keep: dict[int, set[Feature]] = {}
    drop: dict[int, list[Entry]] = {}
    for (feature, step), end in last.items():
        keep.setdefault(step, set()).add(feature)
        drop.setdefault(end, []).append((feature, step))
    return [
        plan and replace(plan, keep=frozenset(keep.get(step, ())), drop=tuple(drop.get(step, ())))
        for step, plan in enumerate(plans)
    ]


def _outputs(sites: Sites, plans: Sequence[StepPlan], guidance: Sequence[bool]) -> list[RowPlan]:
    """What a trajectory reads and remembers of its own predictions."""
    views: list[View] = [
        {site: reuse for site, reuse in plan.reuse.items() if site == OUTPUT and isinstance(reuse, Recall)}
        for plan in plans
    ]
    switches = frozenset(step for step in range(1, len(plans)) if guidance[step] != guidance[step - 1])
    return [plan for plan in _link(sites, views, switches) if plan is not None]


def feature_bytes(
    sites: Sites, steps: Sequence[StepRows], height: int, width: int, itemsize: int, latent_itemsize: int | None = None
) -> int:
    """The most that one trajectory ever remembers, in bytes, for latents of this size: known before it starts.

    A gate remembers most where it has everything computed. `itemsize` is that of the network's numbers; predictions
    are kept in that of the latents.
    """
    sizes: dict[Feature, int] = {}

    def size(feature: Feature) -> int:
        if feature not in sizes:
            each = latent_itemsize or itemsize if feature.site == OUTPUT else itemsize
            sizes[feature] = prod(sites.shape(feature, height, width)) * each
        return sizes[feature]

    held = most = 0
    by_role = [most_entries(steps, CONDITIONAL), *[most_entries(steps, UNCONDITIONAL)] * steps[0].guides]
    for i, step in enumerate(steps):
        plans = [*step, step.output]
        held += sum(size(feature) for plan in plans for feature in plan.keep)
        gates = [rows[i] for rows in by_role]
        most = max(most, held + sum(count * size(g.feature) + size(g.probe[0]) for g, count in gates if g and count))
        held -= sum(size(feature) for plan in plans for feature, _ in plan.drop)
    return most
