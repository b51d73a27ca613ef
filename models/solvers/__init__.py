"""Stepping: each scheduler as a table of coefficients, and one step for all trajectories of a tick."""

from models.solvers.batched import (
    Move,
    Packed,
    combine,
    draw_noise,
    first_state,
    model_input,
    pack,
    preview,
    stack,
    step,
)
from models.solvers.tables import NotLinear, Table, table

__all__ = [
    "Move",
    "NotLinear",
    "Packed",
    "Table",
    "combine",
    "draw_noise",
    "first_state",
    "model_input",
    "pack",
    "preview",
    "stack",
    "step",
    "table",
]
