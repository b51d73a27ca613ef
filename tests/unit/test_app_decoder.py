"""What waits to be decoded: dropped with its job, in smaller chunks where memory ends, delivered when all are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from app.engine import decoder
from app.engine.decoder import Decoder
from app.engine.job import Event, Finished, Job, Lane, Preview
from app.metrics import Metrics
from models import Request
from models.resolve import resolve
from tests.unit.specs import unet_spec


class Line:
    """A decoder whose pictures are the latents' names, with what it decoded and whom it ended."""

    def __init__(self, patch: pytest.MonkeyPatch, room: int = 9) -> None:
        self.chunks: list[list[str]] = []
        self.ended: list[tuple[str, Event]] = []
        backbones: dict[str, Any] = {"unet": None}
        self.decoder = Decoder(backbones, 4, Metrics(), lambda job, event: self.ended.append((job.id, event)))
        self._names: dict[int, str] = {}

        def decode(_: object, latents: Sequence[Tensor]) -> list[str]:
            if len(latents) > room:
                raise torch.OutOfMemoryError
            self.chunks.append([self._names[id(one)] for one in latents])
            return self.chunks[-1]

        patch.setattr(decoder, "decode", decode)

    def add(self, lane: Lane, step: int | None = None) -> None:
        latents = torch.zeros(0)
        self._names[id(latents)] = f"{lane.job.id}{lane.index}"
        self.decoder.add(lane, latents, step)

    def work(self) -> None:
        while len(self.decoder):
            self.decoder.work()


def job(name: str, images: int = 1) -> Job:
    run = resolve(unet_spec(), {}, Request(prompt="", num_images=images, num_inference_steps=2))
    return Job(name, "unet", run, "none", lambda event: None)


def test_a_dropped_jobs_latents_are_never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    line, gone, stays = Line(monkeypatch), job("gone", 2), job("stays")
    for lane in (*gone.lanes, *stays.lanes):
        line.add(lane)
    line.decoder.drop(gone)
    assert len(line.decoder) == 1
    line.work()
    assert line.chunks == [["stays0"]]
    assert line.ended == [("stays", Finished(["stays0"]))]  # type: ignore[list-item]


def test_out_of_memory_halves_the_chunk_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    line, jobs = Line(monkeypatch, room=2), [job(name) for name in "abcde"]
    for one in jobs:
        line.add(one.lanes[0])
    line.work()
    assert line.chunks == [["a0", "b0"], ["c0", "d0"], ["e0"]]
    assert [name for name, _ in line.ended] == list("abcde")


def test_a_job_ends_with_its_last_image_and_not_with_a_preview(monkeypatch: pytest.MonkeyPatch) -> None:
    line, two = Line(monkeypatch), job("two", 2)
    posted: list[Event] = []
    two.post = posted.append
    line.add(two.lanes[1])
    line.add(two.lanes[0], step=1)
    line.work()
    assert (line.ended, posted) == ([], [Preview("two0", 1, 0)])  # type: ignore[arg-type]
    line.add(two.lanes[0])
    line.work()
    assert line.ended == [("two", Finished(["two0", "two1"]))]  # type: ignore[list-item]
