"""What is asked of one forward: plain data, no tensors.

An accelerator answers each step with a `StepPlan` that only says what to *reuse*. `compile_run` merges the answers of a
request's accelerators and works out, backwards over the run (liveness analysis, as in a compiler), what each row has to
*remember* at which step and when it may forget it. So no accelerator manages memory, and a reuse of something that was
never computed is an error before the first forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from models.accelerators.base import Accelerator

Key = tuple[str, int] | tuple[str, int, int]
"""Names one remembered feature: ("level", b), ("range", start, stop), ("attention", block), ("residual", block)."""

Role = str
"""What a row is for: "conditional", and in guided steps a family's others, which all follow one plan."""
Method = Literal["full", "ast", "wa-rs", "asc", "wa-rs+asc"]
"""One DiTFastAttn choice for a self-attention: see `models.accelerators.ditfastattn`."""
RowMethod = Literal["full", "window", "reuse", "twin", "twin-window"]
"""What one row does in a self-attention. The `twin` methods take the conditional row's result of the same step."""


@dataclass(frozen=True, slots=True)
class Exit:
    """Leave the U-Net after input block `level`; go on with the remembered hidden state, or with zeros."""

    level: int
    remembered: bool = True


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What an accelerator asks of one step of one trajectory. `None` means: not my business."""

    exit: Exit | None = None
    cached: tuple[int, int] | None = None  # DiT blocks [start, stop) replaced by their remembered effect
    attention: tuple[Method, ...] | None = None  # one method a DiT block
    window: int | None = None  # half width of the attention band, in tokens
    guided: bool | None = None
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What one row does in one forward, what it remembers (`keep`) and what is still wanted afterwards (`live`)."""

    exit: Exit | None = None
    cached: tuple[int, int] | None = None
    attention: tuple[RowMethod, ...] | None = None
    window: int = 0
    adapter: str | None = None
    keep: frozenset[Key] = frozenset()
    live: frozenset[Key] = frozenset()

    @property
    def reduced(self) -> bool:
        """Whether anything of the plain forward is left out."""
        return self.exit is not None or self.cached is not None or any(m != "full" for m in self.attention or ())

    def runs(self, block: int) -> bool:
        """Whether this row runs DiT block `block`."""
        return self.cached is None or not self.cached[0] <= block < self.cached[1]

    def method(self, block: int) -> RowMethod:
        """This row's self-attention in DiT block `block`."""
        return "full" if self.attention is None else self.attention[block]


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one trajectory in one step: `unconditional` is None where the step is not guided.

    `guides`: how many rows follow it, one for each role of the family's guidance beside the conditional.
    """

    conditional: RowPlan
    unconditional: RowPlan | None
    guides: int = 1

    @property
    def num_rows(self) -> int:
        """One, and where the step is guided one more for each of its guides."""
        return 1 if self.unconditional is None else 1 + self.guides

    @property
    def reduced(self) -> bool:
        """Whether any row of this step does less than the plain forward."""
        return any(plan.reduced for plan in self)

    def __iter__(self) -> Iterator[RowPlan]:
        yield self.conditional
        if self.unconditional is not None:
            yield from (self.unconditional,) * self.guides


def merge(plans: Sequence[StepPlan]) -> StepPlan:
    """Join the plans of several accelerators, field by field. Their claims are disjoint, so no field is set twice."""
    given = {f.name: value for p in plans for f in fields(StepPlan) if (value := getattr(p, f.name)) is not None}
    return StepPlan(**given)


@lru_cache(maxsize=1024)
def compile_run(
    accelerators: tuple[Accelerator, ...], num_steps: int, guided: bool, guides: int = 1
) -> tuple[StepRows, ...]:
    """Every step of a run as row plans.

    A step is one evaluation of the backbone: a two-evaluation scheduler such as Heun has 2n - 1 of them.
    Where guidance comes back after an unguided stretch, both rows take a plain step: the unconditional row has
    nothing to remember yet, and features of different age would be amplified by the guidance scale.
    """
    steps = [merge([a.plan(step, num_steps) for a in accelerators]) for step in range(num_steps)]
    guidance = [guided and plan.guided is not False for plan in steps]
    for step in range(1, num_steps):
        if guidance[step] and not guidance[step - 1]:
            steps[step] = _refreshed(steps[step])
    conditional = _with_memory([row_plan(plan, "conditional") for plan in steps])
    unconditional = _with_memory(
        [row_plan(plan, "unconditional") if on else None for plan, on in zip(steps, guidance, strict=True)]
    )
    return tuple(StepRows(c, u, guides) for c, u in zip(conditional, unconditional, strict=True) if c is not None)


def _refreshed(plan: StepPlan) -> StepPlan:
    """The same step without reuse of anything remembered."""
    forgets = plan.exit is not None and plan.exit.remembered
    full: Method = "full"
    attention = None if plan.attention is None else (full,) * len(plan.attention)
    return replace(plan, exit=None if forgets else plan.exit, cached=None, attention=attention)


_ROW_METHODS: dict[Role, dict[Method, RowMethod]] = {
    "conditional": {"full": "full", "ast": "reuse", "wa-rs": "window", "asc": "full", "wa-rs+asc": "window"},
    "unconditional": {"full": "full", "ast": "reuse", "wa-rs": "window", "asc": "twin", "wa-rs+asc": "twin-window"},
}


def row_plan(plan: StepPlan, role: Role) -> RowPlan:
    """What a step plan asks of the row with this role; nothing is remembered yet."""
    methods = None if plan.attention is None else tuple(_ROW_METHODS[role][method] for method in plan.attention)
    return RowPlan(plan.exit, plan.cached, methods, plan.window or 0, plan.adapter)


def _with_memory(plans: Sequence[RowPlan | None]) -> list[RowPlan | None]:
    """Fill in `keep` and `live`, walking the run backwards. A step without this row (None) keeps what it has."""
    live: frozenset[Key] = frozenset()
    result: list[RowPlan | None] = []
    for plan in reversed(plans):
        if plan is None:
            result.append(None)
            continue
        keep = frozenset(key for key in live if computes(plan, key))
        result.append(replace(plan, keep=keep, live=live))
        live = (live - keep) | _reads(plan)
    if live:
        raise KeyError(f"reused before it was computed: {sorted(live)}")
    return result[::-1]


def _reads(plan: RowPlan) -> frozenset[Key]:
    keys: set[Key] = set()
    if plan.exit is not None and plan.exit.remembered:
        keys.add(("level", plan.exit.level))
    if plan.cached is not None:
        keys.add(("range", *plan.cached))
    for block, method in enumerate(plan.attention or ()):
        if plan.runs(block) and method == "reuse":
            keys.add(("attention", block))
        if plan.runs(block) and method == "window":
            keys.add(("residual", block))
    return frozenset(keys)


def computes(plan: RowPlan, key: Key) -> bool:
    """Whether a forward under this plan has the feature to remember."""
    match key:
        case ("level", level):
            return plan.exit is None or plan.exit.level > level
        case ("range", start, stop):
            return all(plan.runs(block) for block in range(start, stop))
        case ("attention", block):
            return plan.runs(block) and plan.method(block) != "reuse"
        case ("residual", block):
            return plan.runs(block) and plan.method(block) in ("full", "twin")
    raise KeyError(key)
