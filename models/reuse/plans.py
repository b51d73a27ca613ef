"""What is asked of one step and of one forward: plain data, no tensors.

An accelerator answers each step with a `StepPlan` that only says what to *reuse*. `models.reuse.compile` merges the
answers and works out what each row has to remember when, so no accelerator manages memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from models.reuse.gates import Gate
from models.reuse.sites import OUTPUT, Feature, Kind, Site
from models.reuse.weights import Basis

Role = str
"""What a row is for: "conditional", and in guided steps a family's others, which all follow one plan."""


@dataclass(frozen=True, slots=True)
class Zeros:
    """Zeros stand in for the site."""

    name: ClassVar[str] = "zeros"
    leaves: ClassVar[frozenset[Kind]] = frozenset()
    """What of the site can be remembered in a step that does this."""


@dataclass(frozen=True, slots=True)
class Recall:
    """A weighted sum of what the site gave when it was last computed: order 0 repeats it, order k extrapolates."""

    order: int = 0
    basis: Basis = "newton"
    name: ClassVar[str] = "recall"
    leaves: ClassVar[frozenset[Kind]] = frozenset()


@dataclass(frozen=True, slots=True)
class Window:
    """Attention in a band of 2 * width + 1 tokens, plus the remembered residual of the last full one."""

    width: int
    name: ClassVar[str] = "window"
    leaves: ClassVar[frozenset[Kind]] = frozenset({"value"})


@dataclass(frozen=True, slots=True)
class Shared:
    """Computed for the conditional row, in full or in a band, and given to its unconditional twin."""

    of: Window | None = None
    name: ClassVar[str] = "shared"


@dataclass(frozen=True, slots=True)
class Twin:
    """The unconditional half of `Shared`: the conditional row's result of the same step."""

    of: Window | None = None
    name: ClassVar[str] = "twin"

    @property
    def leaves(self) -> frozenset[Kind]:
        """A full attention leaves both its result and its residual."""
        return frozenset({"value", "residual"} if self.of is None else {"value"})


@dataclass(frozen=True, slots=True)
class Gated:
    """`recall` where the gate's rule finds little changed, else computed. A guided pair decides together."""

    rule: Gate
    recall: Recall = Recall()

    @property
    def name(self) -> str:
        """A site may be able to give one probe and not the other."""
        return f"gated by {self.rule.probe}"


Reuse = Zeros | Recall | Window | Shared | Gated
RowReuse = Zeros | Recall | Window | Twin


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What an accelerator asks of one step of one trajectory. `None` means: not my business."""

    reuse: Mapping[Site, Reuse] = field(default_factory=dict)
    guided: bool | None = None
    adapter: str | None = None


Entry = tuple[Feature, int]
"""One remembered tensor: a feature, and the step at which it was computed."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What stands in for a site in one forward of one row: the reuse, and the weighted entries that it reads."""

    reuse: RowReuse
    entries: tuple[Entry, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Gating:
    """What one row's gate does in one step. What it remembers of the site, and of its probe, outlasts each step.

    `forced` steps compute the site without asking. At a `restart` what was computed before counts no more. After the
    `last` step that may read anything, all is forgotten.
    """

    site: Site
    feature: Feature
    gated: Gated
    forced: bool = False
    restart: bool = False
    last: bool = False

    @property
    def probe(self) -> Entry:
        """The last probe, which each new one replaces."""
        return Feature(self.site, "probe"), 0


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What one row does in one forward: `reads` in place of sites, `keep` of what it computes, `drop` afterwards.

    With `gating` the rest is what it does whatever its gate decides (`models.reuse.turns.settled`).
    """

    step: int = 0
    reads: Mapping[Site, Reading] = field(default_factory=dict)
    keep: frozenset[Feature] = frozenset()
    drop: tuple[Entry, ...] = ()
    adapter: str | None = None
    gating: Gating | None = None

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for rows that are asked for the same, whatever they remember."""
        gated = None if self.gating is None or self.gating.forced else (self.gating.site, self.gating.gated)
        return self.adapter, frozenset((site, reading.reuse) for site, reading in self.reads.items()), gated

    @property
    def reduced(self) -> bool:
        """Whether anything of the plain forward is left out."""
        return bool(self.reads)


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one trajectory in one step. Without a conditional row the whole prediction is foretold.

    `output` is what the trajectory itself reads and remembers: its predictions, guidance included. `guides` says how
    many rows follow `unconditional`: one for each role of the family's guidance beside the conditional.
    """

    conditional: RowPlan | None
    unconditional: RowPlan | None = None
    output: RowPlan = RowPlan()
    guides: int = 1

    @property
    def num_rows(self) -> int:
        """No row where the prediction is foretold; else one, and in guided steps one more for each of the guides."""
        return sum(1 for _ in self)

    @property
    def gated(self) -> bool:
        """Whether a gate decides what this step does."""
        return any(plan.gating is not None for plan in self)

    @property
    def foretold(self) -> bool:
        """Whether this step needs no forward."""
        return OUTPUT in self.output.reads

    @property
    def reduced(self) -> bool:
        """Whether this step does less than the plain forward."""
        return self.foretold or any(plan.reduced for plan in self)

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for steps that are asked for the same."""
        return tuple(plan.signature for plan in self)

    def __iter__(self) -> Iterator[RowPlan]:
        return (plan for plan in (self.conditional, *(self.unconditional,) * self.guides) if plan is not None)
