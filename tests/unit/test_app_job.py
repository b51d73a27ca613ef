"""A job as plain data: what shares a forward, what is left to do, when a preview is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from app.engine.job import Job, Timing, preview_steps
from models.accelerators import DeepCache, SelectiveGuidance
from tests.unit.fakes import Hand, make_job


def test_images_of_one_model_and_size_share_a_forward() -> None:
    job = make_job(images=3, width=24, height=16)
    assert job.group == ("unet", 24, 16, ())
    assert [(lane.job, lane.index, lane.group) for lane in job.lanes] == [(job, i, job.group) for i in range(3)]
    assert make_job(width=24, height=16, steps=9, **GUIDED).group == job.group
    others = [
        make_job(width=16, height=24),
        make_job(width=24, height=24),
        make_job(width=24, height=16, model="other"),
    ]
    assert len({other.group for other in (job, *others)}) == 4


GUIDED: Mapping[str, Any] = {"guidance_scale": 3.0}
CACHED: Mapping[str, Any] = {"acceleration": DeepCache(interval=2)}


def test_what_is_left_to_do() -> None:
    """Guided on the first half of four steps: rows 2, 2, 1, 1 for each of two images."""
    hand = Hand(max_rows=3)
    job = hand.add(1, 2, steps=4, guidance_scale=3.0, acceleration=SelectiveGuidance(stop=0.5))

    def left() -> tuple[int, list[int], int]:
        return job.steps_done, [lane.num_rows for lane in job.lanes], job.rows_left

    assert job.total_steps == 8
    assert left() == (0, [2, 2], 12)
    hand.work(1)
    assert left() == (1, [2, 2], 10)
    hand.work(1)
    assert left() == (2, [1, 2], 8)
    hand.work(1)
    assert left() == (4, [1, 2], 5)
    assert [lane.step for lane in job.lanes] == [3, 1]


@pytest.mark.parametrize(
    ("count", "num_steps", "expected"),
    [
        (0, 10, []),
        (1, 10, [5]),
        (2, 6, [2, 4]),
        (3, 10, [2, 5, 7]),
        (9, 10, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (10, 3, [1, 2]),  # more than there are steps: after each but the last
        (1, 1, []),
        (5, 2, [1]),
    ],
)
def test_previews_are_even_and_never_the_last(count: int, num_steps: int, expected: list[int]) -> None:
    assert sorted(preview_steps(count, num_steps)) == expected


def test_a_jobs_previews_are_counted_in_evaluations() -> None:
    job: Job = make_job(steps=4, previews=1, scheduler="heun")
    assert len(job.run.steps) == 7
    assert job.preview_steps == {3}
    assert make_job(steps=4).preview_steps == frozenset()


def test_times() -> None:
    timing = Timing(submitted=1.0, started=3.0, denoised=7.0, finished=15.0)
    assert (timing.queue, timing.denoise, timing.decode) == (2.0, 4.0, 8.0)


def test_the_stages_that_a_job_reached() -> None:
    whole = Timing(submitted=1.0, started=3.0, encoded=4.0, denoised=7.0, finished=15.0)
    assert list(whole.stages(20.0)) == [
        ("queue", 1.0, 3.0), ("encode", 3.0, 4.0), ("denoise", 4.0, 7.0), ("decode", 7.0, 15.0)
    ]  # fmt: skip
    assert not list(Timing().stages(20.0))
    assert list(Timing(submitted=1.0).stages(20.0)) == [("queue", 1.0, 20.0)]
    assert list(Timing(submitted=1.0, started=3.0, encoded=4.0, finished=5.0).stages(20.0))[2:] == [
        ("denoise", 4.0, 5.0)
    ]
