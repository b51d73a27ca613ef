"""What a finished request is said to have cost."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Usage:
    """What a request cost: `steps` a trajectory, `rows` in all, MACs as it ran and as asked for in full: where `auto`
    chose, of the steps of its own scheduler.

    `evaluations` are the steps of a trajectory with a forward: all but those whose prediction is foretold.
    """

    steps: int
    rows: int
    macs: int
    macs_unaccelerated: int
    evaluations: int
