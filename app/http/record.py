"""What is known of one HTTP request when it ends: filled in on the way, then counted and logged once."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from app.errors import ServiceError
from app.metrics import UNKNOWN


@dataclass
class Record:
    """Facts of one request. `endpoint` stays empty for routes that generate nothing.

    `client` is whose share of the device it is served with, and `weight` how large that is beside others'. `arrived` is
    on the monotonic clock: deadlines run from it, and `stages`, each with its begin and end, are on the same.
    """

    request_id: str
    endpoint: str = ""
    client: str = ""
    weight: float = 1.0
    arrived: float = field(default_factory=time.monotonic)
    model: str = UNKNOWN
    acceleration: str = UNKNOWN
    outcome: str = "ok"
    status: int = 0
    code: str = ""
    error: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    stages: list[tuple[str, float, float]] = field(default_factory=list)

    def failed(self, error: ServiceError) -> None:
        """Note how it failed."""
        self.outcome, self.code, self.error, self.status = error.outcome, error.code, error.message, error.status
