"""How far training is: a bar with loss and time left on a terminal, plain lines elsewhere."""

import time
from types import TracebackType
from typing import Self

import rich.progress
from rich.console import Console
from torch import Tensor

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """A context manager around rich's bar; the loss is read from the device only when something is shown."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._console = Console()
        self._shown = float("-inf")
        columns = ("[progress.description]{task.description}", rich.progress.BarColumn(), "{task.fields[note]}")
        self._bar = rich.progress.Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(name, total=1.0, note="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, step: int, share: float, seconds: float, loss: Tensor) -> None:
        """Show step, loss and time left; at most once a second on a terminal, twice a minute elsewhere."""
        now = time.monotonic()
        if now - self._shown < (1.0 if self._console.is_terminal else SECONDS_BETWEEN_LINES):
            return
        self._shown = now
        left = seconds / share - seconds if share > 0 else 0.0
        note = f"step {step} loss {loss.item():.4f} {1000 * seconds / step:.0f} ms/step, {left / 60:.1f} min left"
        self._bar.update(self._task, completed=share, note=note)
        if not self._console.is_terminal:
            print(f"{self._name}: {note}", flush=True)

    def say(self, text: str) -> None:
        """One line that stays."""
        print(f"{time.strftime('%H:%M:%S')} {self._name}: {text}", flush=True)
