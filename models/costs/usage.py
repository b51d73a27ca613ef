"""What a finished request is said to have cost."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Usage:
    """What a request cost: `steps` evaluations a trajectory, `rows` in all, MACs with and without its accelerators."""

    steps: int
    rows: int
    macs: int
    macs_unaccelerated: int
