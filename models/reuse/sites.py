"""The parts of a network whose result a row may take from memory, and what a network declares of them. Plain data.

Every site covers a span of the network's parts in the order in which they run. A site contains the sites whose spans
lie inside its own, so one rule serves nested levels, sequences of blocks, attentions in blocks, and the whole network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

Kind = Literal["value", "effect", "residual", "probe"]
"""What is remembered of a site: its result, its result minus its input, full minus banded attention, or what its gate
looked at."""


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """A site by name: `output`, `level b` of a U-Net, `blocks i..j` or `attention k` of a transformer."""

    kind: str
    start: int = 0
    stop: int | None = None

    def __str__(self) -> str:
        if self.kind == "output":
            return self.kind
        return f"{self.kind} {self.start}" + (f"..{self.stop}" if self.stop is not None else "")


OUTPUT = Site("output")
"""The whole network: the prediction that a scheduler steps along, guidance included."""


class Feature(NamedTuple):
    """Something a row can remember. `width` is the half width of the band that a residual completes, in tokens."""

    site: Site
    kind: Kind
    width: int = 0


Span = tuple[int, int]
"""The parts [start, stop) that a site covers, numbered in the order in which they run."""


class Sites(Protocol):
    """A network's own declaration of its sites. Hashable, so that what follows from it can be remembered."""

    def span(self, site: Site) -> Span:
        """The parts that a site covers. Raises `KeyError` for a site that this network does not have."""

    def remembers(self, site: Site) -> Kind:
        """Whether reading the site gives its value, or an effect that is added to what enters it."""

    def understands(self, site: Site) -> frozenset[str]:
        """The names of the kinds of reuse that this site can do (`models.reuse.plans`)."""

    def shape(self, feature: Feature, height: int, width: int) -> tuple[int, ...]:
        """The shape of one row's feature for latents of this height and width."""


def contains(outer: Span, inner: Span) -> bool:
    """Whether one span lies inside another, or is the same."""
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def disjoint(one: Span, other: Span) -> bool:
    """Whether two spans share no part."""
    return one[1] <= other[0] or other[1] <= one[0]
