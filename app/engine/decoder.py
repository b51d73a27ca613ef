"""Latents that wait to become pixels; a few of them are decoded after every tick. Runs on the engine thread only."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from app.engine.attempt import attempt
from app.engine.job import Event, Failed, Finished, Job, Lane, Preview
from app.errors import ForwardFailed, OutOfMemory
from app.logs import SERVER
from app.metrics import Metrics
from models.backbone import Backbone
from models.device import out_of_memory, release_memory
from models.generate import decode

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Decode:
    """Latents that wait to become a picture: final ones, or a preview after `step` evaluations."""

    lane: Lane
    latents: Tensor
    step: int | None = None


class Decoder:
    """Decodes `chunk` latents at a time, fewer after the device ran out of memory. `end` ends a job."""

    def __init__(
        self, backbones: Mapping[str, Backbone], chunk: int, metrics: Metrics, end: Callable[[Job, Event], None]
    ) -> None:
        self._backbones = backbones
        self._chunk = chunk
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
        """Decode the oldest latents and those behind them that fit into the same batch."""
        group = self._waiting[0].lane.group
        chunk = [d for d in self._waiting if d.lane.group == group][: self._chunk]
        images: list[Tensor] = []
        backbone = self._backbones[chunk[0].lane.job.model]
        error = attempt(lambda: images.extend(decode(backbone, [d.latents for d in chunk])))
        if error is not None and out_of_memory(error):
            self._metrics.out_of_memory.inc()
            release_memory()
            if len(chunk) > 1:
                self._chunk = len(chunk) // 2
                return
        taken = set(chunk)
        self._waiting = deque(d for d in self._waiting if d not in taken)
        if error is not None:
            SERVER.error("decoding %d images failed", len(chunk), exc_info=error)
            kind = OutOfMemory if out_of_memory(error) else ForwardFailed
            for job in {d.lane.job for d in chunk}:
                self._end(job, Failed(kind("the images could not be decoded")))
            return
        for waiting, image in zip(chunk, images, strict=True):
            self._deliver(waiting, image)

    def _deliver(self, decoded: Decode, image: Tensor) -> None:
        lane, job = decoded.lane, decoded.lane.job
        if decoded.step is not None:
            job.post(Preview(image, decoded.step, lane.index))
            return
        lane.image = image
        images = [other.image for other in job.lanes if other.image is not None]
        if len(images) == len(job.lanes):
            self._end(job, Finished(images))
