"""The plan file of DiTFastAttn: which self-attention does what at which step, and for which run it was searched."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.errors import ModelLoadError

Method = Literal["full", "ast", "wa-rs", "asc", "wa-rs+asc"]
"""One choice for a self-attention: see `models.accelerators.ditfastattn`."""
METHODS: tuple[Method, ...] = ("full", "ast", "wa-rs", "asc", "wa-rs+asc")
Metric = Literal["paper", "signed"]


class Plan(BaseModel):
    """One method for each (backbone evaluation, transformer block), with the run that it fits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    model: str
    config_hash: str
    scheduler: str
    num_inference_steps: int = Field(ge=1)
    tokens: int = Field(ge=1)
    guidance: bool
    window: int = Field(ge=0, description="Half width of the attention band, in tokens.")
    threshold: float = Field(ge=0, description="The search's δ.")
    metric: Metric = "paper"
    table: Annotated[tuple[tuple[Method, ...], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len({len(row) for row in self.table}) != 1:
            raise ValueError("table: every step must name a method for every block")
        if any(method != "full" for method in self.table[0]):
            raise ValueError("table: step 0 must be full, there is nothing to share yet")
        if not self.guidance and self.shares_guidance:
            raise ValueError("table: asc needs guidance, but the plan is for unguided runs")
        return self

    @property
    def shares_guidance(self) -> bool:
        """Whether any attention is shared across guidance (ASC)."""
        return any("asc" in method for row in self.table for method in row)

    @property
    def counts(self) -> Counter[str]:
        """How often each method is used."""
        return Counter(method for row in self.table for method in row)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file. Raises `ModelLoadError` where it is not one."""
        try:
            return cls.model_validate_json(Path(path).read_text())
        except (OSError, ValidationError) as error:
            raise ModelLoadError(f"not a DiTFastAttn plan: {path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, one line a step, so that a diff of two plans can be read."""
        head = self.model_dump(exclude={"table"})
        rows = ",\n    ".join(json.dumps(row) for row in self.table)
        Path(path).write_text(f'{json.dumps(head, indent=2)[:-2]},\n  "table": [\n    {rows}\n  ]\n}}\n')

    def draw(self, path: str | Path) -> None:
        """Save a picture of the plan: blocks across, steps down, a colour a method."""
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

        colours = ["#33425b", "#f2c14e", "#4d9078", "#f78154", "#b4436c"]
        grid = [[METHODS.index(method) for method in row] for row in self.table]
        figure = Figure(figsize=(2.5 + 0.28 * len(grid[0]), 1.5 + 0.2 * len(grid)), layout="constrained")
        axes = figure.subplots()
        axes.pcolormesh(grid, cmap=ListedColormap(colours), vmin=-0.5, vmax=4.5, edgecolors="white", linewidth=0.5)
        axes.invert_yaxis()
        axes.set(xlabel="block", ylabel="step", title=f"{self.model}, δ = {self.threshold:g}, w = {self.window}")
        used = [(colour, method) for colour, method in zip(colours, METHODS, strict=True) if self.counts[method]]
        handles = [Patch(color=colour, label=f"{method} {self.counts[method]}") for colour, method in used]
        axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        figure.savefig(path, dpi=120)
