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
from tests.unit.fakes import FakeBackbone, error_of, greys, make_job, sample
from tests.unit.specs import unet_spec


class Line:
    """A decoder whose pictures are the latents' names, with what it decoded and whom it ended."""

    def __init__(self, patch: pytest.MonkeyPatch, room: int = 9) -> None:
        self.chunks: list[list[str]] = []
        self.ended: list[tuple[str, Event]] = []
        backbones = {"unet": FakeBackbone().real}
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


class Fakes:
    """A decoder on models without networks, and what it told of jobs."""

    def __init__(self, chunk: int = 4) -> None:
        self.unet, self.other, self.metrics = FakeBackbone(), FakeBackbone(), Metrics()
        self.ended: list[tuple[Job, Event]] = []
        backbones = {"unet": self.unet.real, "other": self.other.real}
        self.decoder = Decoder(backbones, chunk, self.metrics, self._end)

    def _end(self, job: Job, event: Event) -> None:
        assert job not in dict(self.ended), "a job ends once"
        self.ended.append((job, event))
        self.decoder.drop(job)

    def add(self, seed: int, images: int = 1, **options: Any) -> Job:
        """A job whose images are all there."""
        one = make_job(self.unet, seed, images, **options)
        run = one.run
        for lane in one.lanes:
            self.decoder.add(lane, torch.full((1, 1, run.height // 8, run.width // 8), float(seed + lane.index)))
        return one

    def work(self) -> None:
        """One chunk."""
        self.decoder.work()


def test_a_chunk_is_of_one_size_and_model_oldest_first() -> None:
    fakes = Fakes(chunk=2)
    jobs = [
        fakes.add(1, width=24),
        fakes.add(2, height=24),
        fakes.add(3, 2, width=24),
        fakes.add(5, model="other", width=24),
    ]
    for _ in range(4):
        fakes.work()
    assert (fakes.unet.decoded, fakes.other.decoded) == ([[1, 3], [2], [4]], [[5]])
    assert [job for job, _ in fakes.ended] == [jobs[0], jobs[1], jobs[2], jobs[3]]
    assert [greys(event) for _, event in fakes.ended] == [[1], [2], [3, 4], [5]]
    assert len(fakes.decoder) == 0


def test_a_picture_at_fault_fails_its_job_and_leaves_the_others() -> None:
    fakes, tried = Fakes(chunk=4), list[list[int]]()

    def before(seeds: list[int]) -> None:
        tried.append(seeds)
        if 3 in seeds:
            raise RuntimeError("secret")

    fakes.unet.before_decode = before
    first, second, third = fakes.add(1), fakes.add(2, 4), fakes.add(6)
    fakes.work()
    assert tried == [[1, 2, 3, 4], [1, 2], [3, 4], [3]], "the fourth is of the job that has failed"
    assert [job for job, _ in fakes.ended] == [first, second]
    assert greys(fakes.ended[0][1]) == [1]
    assert error_of(fakes.ended[1][1]).code == "forward_failed"
    assert "secret" not in error_of(fakes.ended[1][1]).message
    assert len(fakes.decoder) == 1  # the rest of the second has gone with it
    fakes.work()
    assert fakes.ended[2][0] is third
    assert greys(fakes.ended[2][1]) == [6]
    assert sample(fakes.metrics, "out_of_memory_total") == 0


def test_out_of_memory_with_a_single_picture_fails_its_job() -> None:
    fakes = Fakes(chunk=5)
    sizes: list[int] = []

    def before(seeds: list[int]) -> None:
        sizes.append(len(seeds))
        if 1 in seeds:
            raise torch.OutOfMemoryError

    fakes.unet.before_decode = before
    bad, *good = [fakes.add(seed) for seed in range(1, 6)]
    fakes.work()
    assert sizes == [5, 3, 2, 1, 1, 1, 2]
    assert [job for job, _ in fakes.ended] == [bad, *good]
    assert error_of(fakes.ended[0][1]).code == "out_of_memory"
    assert [greys(event) for _, event in fakes.ended[1:]] == [[2], [3], [4], [5]]
    assert sample(fakes.metrics, "out_of_memory_total") == 4


def test_chunks_are_lowered_by_size_and_grow_again() -> None:
    """Wide pictures have room for two, then for all four; square ones and the other model for four all along."""
    fakes, room = Fakes(chunk=4), [2]

    def before(seeds: list[int]) -> None:
        if min(seeds) >= 100 and len(seeds) > room[0]:
            raise torch.OutOfMemoryError

    fakes.unet.before_decode = before
    wide: dict[str, int] = {"width": 24, "height": 16}
    fakes.add(100, 4, **wide)
    fakes.work()
    assert fakes.unet.decoded == [[100, 101], [102, 103]]
    room[0] = 9
    fakes.unet.decoded.clear()
    fakes.add(1, 4)
    fakes.add(1, 4, model="other", **wide)
    fakes.add(110, 100, **wide)
    while len(fakes.decoder):
        fakes.work()
    assert fakes.unet.decoded[0] == fakes.other.decoded[0] == [1, 2, 3, 4]
    sizes = [len(chunk) for chunk in fakes.unet.decoded[1:]]
    assert sizes == [2] * 16 + [3] * 16 + [4] * 5
    assert sample(fakes.metrics, "out_of_memory_total") == 1
