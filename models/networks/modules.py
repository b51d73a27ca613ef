"""One module of a transformer block over rows of which any may take its result from memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from models.networks.attention import AttentionRows
from models.reuse.plans import RowPlan
from models.reuse.rows import keep
from models.reuse.sites import Feature, Site

Compute = Callable[..., Tensor]
"""From the rows that run a module, and what it is given of them, to its result [rows, tokens, dim]."""


def by_rows(site: Site, batch: AttentionRows | None, given: Sequence[Tensor | None], compute: Compute) -> Tensor:
    """A module's result [rows, tokens, dim]: computed from `given` for the rows that run it, else remembered."""
    if batch is None or not batch.modules or batch.store is None or batch.places is None:
        return compute(batch, *given)
    rows, store, places = batch.rows, batch.store, batch.places
    recalled = [i for i, row in enumerate(rows) if site in row.plan.reads]
    running = [i for i, row in enumerate(rows) if site not in row.plan.reads]
    parts, members = [], []
    if running:
        active = batch.of(running)
        computed = compute(active, *(None if t is None else places.take(t, running) for t in given))
        keep(store, places, active.rows, Feature(site, "value"), computed)
        parts, members = [computed], [running]
    if recalled:
        parts.append(store.read([(rows[i].memory, rows[i].plan.reads[site]) for i in recalled]))
        members.append(recalled)
    return places.joined(parts, members)


def touches(plan: RowPlan, site: Site) -> bool:
    """Whether a row reuses or remembers anything of a module."""
    if site in plan.reads or Feature(site, "value") in plan.keep:
        return True
    return site.kind == "attention" and any(feature.site == site for feature in plan.keep)  # its residuals
