"""Latents that wait to become pixels; a few of them are decoded after every tick. Runs on the engine thread only."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from app.engine.attempt import bisect
from app.engine.caps import Caps
from app.engine.job import Event, Failed, Finished, Job, Lane, Preview
from app.errors import ForwardFailed, OutOfMemory
from app.logs import SERVER
from app.metrics import Metrics
from models.backbone import Backbone
from models.device import out_of_memory, release_memory
from models.generate import decode
from models.trajectory import effective_steps

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Decode:
    """Latents that wait to become a picture: final ones, or a preview after `step` evaluations."""

    lane: Lane
    latents: Tensor
    step: int | None = None


class Decoder:
    """Decodes `chunk` latents at a time, fewer of a group for which memory ended. `end` ends a job."""

    def __init__(
        self, backbones: Mapping[str, Backbone], chunk: int, metrics: Metrics, end: Callable[[Job, Event], None]
    ) -> None:
        self._backbones = backbones
        self._caps = Caps(lambda _: chunk)
        self._metrics = metrics
        self._end = end
        self._waiting: deque[Decode] = deque()

    def __len__(self) -> int:
        """How many latents wait."""
        return len(self._waiting)

    def add(self, lane: Lane, latents: Tensor, step: int | None = None) -> None:
        """Put latents in the line: final ones, or a preview after `step` evaluations."""
        self._waiting.append(Decode(lane, latents, step))

    def drop(self, job: Job) -> None:
        """Forget a job's latents."""
        self._waiting = deque(d for d in self._waiting if d.lane.job is not job)

    def work(self) -> None:
        """Decode the oldest latents and those behind them that fit into the same batch.

        A chunk that fails is halved until the picture at fault is alone, and only its job fails.
        """
        group = self._waiting[0].lane.group
        backbone, cap = self._backbones[group[0]], self._caps(group)
        chunk = [d for d in self._waiting if d.lane.group == group][:cap]
        images: list[Tensor] = []

        def waiting(part: list[Decode]) -> list[Decode]:
            return [d for d in part if d in self._waiting]

        def work(part: list[Decode]) -> None:
            images[:] = list(decode(backbone, [d.latents for d in part]))

        for part, error in bisect(chunk, work, waiting):
            if error is None:
                if part == chunk:
                    self._caps.held(group, len(part))
                for one, image in zip(part, images, strict=True):
                    self._deliver(one, image)
                continue
            if out_of_memory(error):
                self._metrics.out_of_memory.inc()
                backbone.release()
                release_memory()
                if len(part) > 1:
                    self._caps.fell(group, len(part))
            if len(part) > 1:
                SERVER.warning("decoding %d pictures failed, trying halves: %r", len(part), error)
            else:
                SERVER.error("a picture could not be decoded", exc_info=error)
                kind = OutOfMemory if out_of_memory(error) else ForwardFailed
                self._waiting.remove(part[0])
                self._end(part[0].lane.job, Failed(kind("the images could not be decoded")))

    def _deliver(self, decoded: Decode, image: Tensor) -> None:
        lane, job = decoded.lane, decoded.lane.job
        self._waiting.remove(decoded)
        if decoded.step is not None:
            job.post(Preview(image, decoded.step, lane.index))
            return
        lane.image = image
        images = [other.image for other in job.lanes if other.image is not None]
        if len(images) == len(job.lanes):
            ran = [
                effective_steps(one.trajectory)
                for one in job.lanes
                if one.trajectory is not None and one.trajectory.ran
            ]
            self._end(job, Finished(images, ran or None))
