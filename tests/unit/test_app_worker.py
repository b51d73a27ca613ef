"""The worker by hand: who is in which tick, who is told what, and that everything taken is given back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from app.engine.job import Event, Failed, Job, Preview, Progress
from app.engine.rows import Rows
from models.accelerators import Accelerator, DeepCache, DepthSkip, SelectiveGuidance
from models.errors import OutOfRange
from models.families import Family
from models.families.dit import DIT
from models.reuse.plans import Recall, StepPlan
from models.reuse.sites import OUTPUT
from models.solvers import exact
from models.trajectory import Trajectory
from tests.unit.fakes import FEATURE_BYTES, FakeBackbone, Hand, error_of, grey, greys, tiny_spec

CACHE: dict[str, Any] = {"acceleration": DeepCache(interval=2)}
"""Remembers one feature a row between a full step and a reduced one."""


def no_memory(at_most: int) -> Callable[[list[int]], None]:
    """A device with room for so many images a forward."""

    def before(seeds: list[int]) -> None:
        if len(seeds) > at_most:
            raise torch.OutOfMemoryError

    return before


def fail_with(bad: int, error: Exception) -> Callable[[list[int]], None]:
    """A model that cannot do one image, nor any beside it."""

    def before(seeds: list[int]) -> None:
        if bad in seeds:
            raise error

    return before


def codes(hand: Hand) -> dict[int, str]:
    """What the jobs that failed ended with, by their seed."""
    return {job.run.seeds[0]: event.error.code for job, event in hand.ended.items() if isinstance(event, Failed)}


# Who is in which tick


def test_sizes_and_models_take_turns_and_each_has_its_own_cap_and_pictures() -> None:
    hand = Hand({"unet": FakeBackbone(), "other": FakeBackbone()}, {"unet": 3, "other": 2})
    unet, other = hand.backbones.values()
    ended = [
        hand.add(1, 2, width=24, height=16, share="one"),
        hand.add(3, 2, width=16, height=24, share="two"),
        hand.add(5, 3, model="other", width=24, height=16, share="three"),
        hand.add(8, 2, width=24, height=16, share="one"),
    ]
    hand.work(3)
    assert (unet.ticks, other.ticks) == ([[1, 2, 8], [3, 4]], [[5, 6]])
    hand.work()
    assert [greys(hand.ended[job]) for job in ended] == [[1, 2], [3, 4], [5, 6, 7], [8, 9]]
    first, second = hand.ended[ended[0]], hand.ended[ended[1]]
    assert (first.images[0].shape, second.images[0].shape) == ((16, 24, 3), (24, 16, 3))  # type: ignore[union-attr]


def test_guided_rows_count_double() -> None:
    hand = Hand(max_rows=5)
    for seed in range(4):
        hand.add(seed, guidance_scale=3.0)
    hand.add(9)
    hand.work(1)
    assert hand.backbone.ticks == [[0, 1, 9]]
    assert hand.backbone.rows == [5]


def test_a_piece_of_work_is_one_tick_and_one_chunk_of_pictures() -> None:
    hand = Hand(decode_chunk=2)
    assert not hand.worker.busy
    early, late = hand.add(1, 3, steps=1), hand.add(5, steps=4)
    seen: list[tuple[int, int]] = []
    for _ in range(4):
        assert hand.worker.busy
        hand.work(1)
        seen.append((len(hand.backbone.ticks), len(hand.backbone.decoded)))
    assert seen == [(1, 1), (2, 2), (3, 2), (4, 3)]
    assert hand.backbone.decoded == [[1, 2], [3], [5]]
    assert (greys(hand.ended[early]), greys(hand.ended[late])) == ([1, 2, 3], [5])
    assert not hand.worker.busy
    hand.worker.work()  # nothing to do, and nothing happens


def test_it_is_busy_while_only_pictures_are_left() -> None:
    hand = Hand(decode_chunk=1)
    job = hand.add(1, 2, steps=1)
    hand.work(1)
    assert hand.worker.busy
    assert job not in hand.ended
    hand.work(1)
    assert job in hand.ended


# Starting


def test_a_job_is_started_once_by_the_tick_that_first_takes_one_of_its_images() -> None:
    hand = Hand(max_rows=2)
    first, second = hand.add(1, 3, steps=1), hand.add(5, steps=3)
    hand.work(1)
    assert hand.started == [first]
    hand.work()
    assert hand.started == [first, second]
    assert hand.value("queue_duration_seconds_count", model="unet") == 2
    assert hand.value("stage_duration_seconds_count", stage="encode") == 2


def test_the_prompts_of_a_tick_are_encoded_together() -> None:
    hand = Hand()
    hand.add(1, prompt="a", negative_prompt="b", guidance_scale=3.0)
    hand.add(2, prompt="c", steps=4)
    hand.add(3, prompt="d", guidance_scale=3.0)
    hand.work()
    assert hand.backbone.text.batches == [["a", "b", "c", "d", ""]]


SILENT: dict[str, Any] = {"has_text_encoder": False}
OF_CLASSES: dict[str, Any] = {"takes": "class_label", "inputs": frozenset({"class_label"}), "num_classes": 2}


@pytest.mark.parametrize(
    ("spec", "family", "asked"),
    [
        (SILENT, None, {"prompt_embeds": torch.zeros(1, 1, 1)}),
        (OF_CLASSES, DIT, {"class_label": 1, "guidance_scale": 2.0}),
    ],
)
def test_nothing_is_encoded_where_there_is_no_text(
    spec: dict[str, Any], family: Family | None, asked: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    hand = Hand({"unet": FakeBackbone(tiny_spec(**spec), family)})
    job = hand.add(1, **asked)
    hand.work()
    assert greys(hand.ended[job]) == [1]
    assert hand.backbone.text.batches == []
    assert not caplog.records


def test_prompts_that_fail_together_are_tried_one_by_one() -> None:
    def before(prompts: Sequence[str]) -> None:
        if len(prompts) > 1:
            raise RuntimeError("too many")

    hand = Hand()
    hand.backbone.text.before = before
    jobs = [hand.add(seed) for seed in (1, 2)]
    hand.work()
    assert [greys(hand.ended[job]) for job in jobs] == [[1], [2]]


@pytest.mark.parametrize(
    ("error", "code", "param"),
    [
        (RuntimeError("secret"), "internal_error", None),
        (torch.OutOfMemoryError("secret"), "out_of_memory", None),
        (OutOfRange("prompt", "too long"), "out_of_range", "prompt"),
    ],
)
def test_one_that_cannot_start_fails_alone(error: Exception, code: str, param: str | None) -> None:
    def before(prompts: Sequence[str]) -> None:
        if "bad" in prompts:
            raise error

    hand = Hand()
    hand.backbone.text.before = before
    jobs = [hand.add(1), hand.add(2, 2, prompt="bad"), hand.add(4)]
    hand.work()
    assert [greys(hand.ended[job]) for job in (jobs[0], jobs[2])] == [[1], [4]]
    failed = error_of(hand.ended[jobs[1]])
    assert (failed.code, failed.param) == (code, param)
    assert "secret" not in failed.message
    assert hand.started == [jobs[0], jobs[2]]
    assert hand.backbone.ticks == [[1, 4]] * 2
    assert hand.value("out_of_memory_total") == 2 * (code == "out_of_memory")  # together, and then alone
    assert hand.value("queue_duration_seconds_count", model="unet") == 2


def test_where_none_can_start_there_is_no_tick() -> None:
    hand = Hand()

    def before(prompts: Sequence[str]) -> None:
        raise RuntimeError

    hand.backbone.text.before = before
    hand.add(1)
    hand.work()
    assert codes(hand) == {1: "internal_error"}
    assert hand.backbone.ticks == []
    assert hand.value("tick_rows_count", model="unet") == 0
    assert not hand.worker.busy


# Time and numbers


def test_the_times_of_a_job() -> None:
    hand = Hand()
    clock = hand.clock
    job = hand.add(1, steps=2)
    job.timing.submitted = clock.now
    clock.now += 7

    def tick(seconds: float) -> Callable[[object], None]:
        def wait(_: object) -> None:
            clock.now += seconds

        return wait

    hand.backbone.text.before = tick(1)
    hand.backbone.before = tick(2)
    hand.backbone.before_decode = tick(16)
    hand.work()
    assert (job.timing.queue, job.timing.denoise, job.timing.decode) == (7, 5, 16)
    assert hand.value("queue_duration_seconds_sum", model="unet") == 7
    assert hand.value("stage_duration_seconds_sum", stage="encode") == 1
    assert hand.value("tick_duration_seconds_count", model="unet") == 2
    assert hand.value("tick_duration_seconds_sum", model="unet") == 4


def test_the_pace_is_learned_from_ticks() -> None:
    hand = Hand()

    def wait(_: object) -> None:
        hand.clock.now += 6

    hand.backbone.before = wait
    hand.add(1, 3, steps=1)
    hand.work()
    assert hand.pace.predict([("unet", 10)]) == 20


def test_what_ticks_count() -> None:
    hand = Hand()
    hand.add(1, 2, steps=3, **CACHE)
    hand.add(5, steps=3, guidance_scale=2.0)
    hand.add(7, steps=3, acceleration=DepthSkip(depth=2))
    hand.work(1)
    assert hand.value("tick_rows_sum", model="unet") == 5
    assert hand.value("tick_plans_sum", model="unet") == 3  # the same network with and without something to remember
    hand.work()
    assert hand.value("tick_rows_sum", model="unet") == 15
    assert hand.value("tick_rows_count", model="unet") == hand.value("tick_plans_count", model="unet") == 3
    assert hand.value("tick_plans_sum", model="unet") == 3 + 3 + 3

    def steps(acceleration: str, kind: str) -> float:
        return hand.value("denoise_steps_total", model="unet", acceleration=acceleration, kind=kind)

    assert (steps("deepcache", "full"), steps("deepcache", "reduced")) == (4, 2)
    assert (steps("none", "full"), steps("none", "reduced")) == (3, 0)
    assert (steps("depth_skip", "full"), steps("depth_skip", "reduced")) == (0, 3)


def test_plans_that_remember_differently_run_the_same() -> None:
    hand = Hand()
    hand.add(1, steps=2, **CACHE)
    hand.add(2, steps=2)
    hand.work(1)
    assert hand.value("tick_plans_sum", model="unet") == 1
    hand.work(1)
    assert hand.value("tick_plans_sum", model="unet") == 1 + 2


# Progress and previews


def test_progress_counts_over_all_images_once_a_tick() -> None:
    hand = Hand(max_rows=3)
    hand.add(1, 2, steps=2, progress=True)
    hand.add(4, 2, steps=2, progress=True)
    hand.add(7, steps=4)
    hand.work()
    assert hand.posted[1] == [Progress(2, 4), Progress(4, 4)]
    assert hand.posted[4] == [Progress(step, 4) for step in range(1, 5)]
    assert hand.posted[7] == []


def test_previews_of_every_image_show_what_it_is_to_be() -> None:
    hand = Hand()
    hand.add(20, 2, steps=6, previews=2, guidance_scale=2.0)
    hand.work()
    shown = [(p.index, p.step, grey(p.image)) for p in hand.posted[20] if isinstance(p, Preview)]
    assert shown == [(0, 2, 20), (1, 2, 21), (0, 4, 20), (1, 4, 21)]


def test_who_asked_for_no_preview_gets_none() -> None:
    hand = Hand()
    hand.add(20, steps=6)
    hand.work()
    assert hand.posted[20] == []
    assert hand.backbone.decoded == [[20]]


# Foretold steps


class Forecast(Accelerator):
    """One step in three is computed; the whole prediction is foretold in the others."""

    mode: str = "toy"

    def plan(self, step: int, num_steps: int) -> StepPlan:
        """Foretell along the line through the last two predictions."""
        return StepPlan({OUTPUT: Recall(1)} if step % 3 else {})


FORETOLD: dict[str, Any] = {"acceleration": Forecast()}


@pytest.mark.parametrize("stepping", ["exact", "batched"])
def test_foretold_steps_pass_within_a_tick(stepping: str) -> None:
    """Ten steps, guided: four forwards. Beside it a plain image of four steps, in the same ticks."""
    hand = Hand()
    hand.backbone.stepping = stepping
    job = hand.add(1, steps=10, progress=True, guidance_scale=2.0, **FORETOLD)
    plain = hand.add(7, steps=4, progress=True)
    left = [(job.steps_done, job.rows_left, job.lanes[0].num_rows)]
    for _ in range(3):
        hand.work(1)
        left.append((job.steps_done, job.rows_left, job.lanes[0].num_rows))
    assert left == [(0, 8, 2), (3, 6, 2), (6, 4, 2), (9, 2, 2)]
    hand.work()
    assert hand.posted[1] == [Progress(step, 10) for step in (3, 6, 9, 10)]
    assert hand.posted[7] == [Progress(step, 4) for step in (1, 2, 3, 4)]
    assert hand.backbone.rows == [3] * 4
    assert (greys(hand.ended[job]), greys(hand.ended[plain])) == ([1], [7])
    assert (job.run.evaluations, job.run.num_rows, len(job.run.steps)) == (4, 8, 10)
    assert hand.value("tick_rows_sum", model="unet") == 4 * 3
    assert hand.value("tick_plans_sum", model="unet") == 4 * 2
    # A toy's mode is in no label. Six steps are foretold; the plain image's four are computed like its own four.
    assert hand.value("denoise_steps_total", model="unet", acceleration="none", kind="reduced") == 6
    assert hand.value("denoise_steps_total", model="unet", acceleration="none", kind="full") == 4 + 4
    assert hand.value("network_evaluations_total", model="unet", kind="forecast") == 6
    assert hand.value("network_evaluations_total", model="unet", kind="computed") == 4 + 4
    assert hand.value("forecast_steps_total") == 6
    assert hand.value("feature_memory_bytes", model="unet") == 0
    assert hand.backbone.features.reserved_bytes == 0


def test_the_pace_of_foretold_steps_is_by_rows() -> None:
    hand = Hand()

    def wait(_: object) -> None:
        hand.clock.now += 6

    hand.backbone.before = wait
    hand.add(1, 3, steps=6, **FORETOLD)
    hand.work()
    assert hand.pace.predict([("unet", 10)]) == 20


@pytest.mark.parametrize(
    ("steps", "previews", "expected"),
    [
        (10, 4, [3, 6, 9]),  # wanted at 2, 4, 6, 8
        (10, 1, [6]),
        (10, 9, [3, 6, 9]),
        (9, 2, [3, 6]),
        (9, 4, [3, 6]),  # the last is wanted at 7, and behind it only foretold steps are left
        (2, 1, []),
    ],
)
def test_previews_are_shown_at_the_first_step_that_ends_a_tick(steps: int, previews: int, expected: list[int]) -> None:
    hand = Hand()
    job = hand.add(20, 2, steps=steps, previews=previews, guidance_scale=2.0, **FORETOLD)
    hand.work()
    shown = [(p.step, p.index, grey(p.image)) for p in hand.posted[20] if isinstance(p, Preview)]
    assert shown == [(step, i, 20 + i) for step in expected for i in (0, 1)]
    assert greys(hand.ended[job]) == [20, 21]


@pytest.mark.parametrize("again", [False, True])
def test_an_error_among_foretold_steps_is_of_who_is_at_fault(monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    """The forward went well, so what is left is foretold: in a tick without rows. Once, or whenever it is tried."""
    hand, trouble = Hand(), [2]
    original = exact.step

    def step(trajectory: Trajectory, prediction: torch.Tensor) -> torch.Tensor:
        if trajectory.plan.foretold and trajectory.generator.initial_seed() in trouble:
            if not again:
                trouble.clear()
            raise RuntimeError("secret")
        return original(trajectory, prediction)

    monkeypatch.setattr(exact, "step", step)
    jobs = [hand.add(seed, steps=7, progress=True, **FORETOLD) for seed in (1, 2, 3)]
    beside = hand.add(9, steps=1)
    hand.work()
    good = jobs if not again else [jobs[0], jobs[2]]
    assert [greys(hand.ended[job]) for job in (*good, beside)] == [*([job.run.seeds[0]] for job in good), [9]]
    assert codes(hand) == ({2: "forward_failed"} if again else {})
    done = {1: 7, 2: 1 if again else 7, 3: 7}
    assert all(hand.posted[seed][-1] == Progress(steps, 7) for seed, steps in done.items())
    assert hand.value("network_evaluations_total", model="unet", kind="computed") == 3 * (3 - again) + again + 1
    assert hand.value("forecast_steps_total") == 4 * (3 - again)
    assert hand.value("feature_memory_bytes", model="unet") == 0


# Leaving


def test_a_dropped_job_gives_everything_back() -> None:
    hand = Hand(max_feature_bytes=FEATURE_BYTES)
    known = hand.add(0, **CACHE)
    hand.work()
    gone, waits = hand.add(1, steps=9, **CACHE), hand.add(2, steps=9, **CACHE)
    hand.work(1)
    assert hand.backbone.ticks[-1] == [1]
    assert hand.value("feature_memory_bytes", model="unet") == FEATURE_BYTES
    trajectory = weakref.ref(gone.lanes[0].trajectory)
    hand.worker.drop(gone)
    gc.collect()
    assert trajectory() is None
    assert hand.value("feature_memory_bytes", model="unet") == 0
    hand.work()
    assert hand.backbone.ticks[-2:] == [[2], [2]]
    assert list(hand.ended) == [known, waits]


def test_one_dropped_while_it_waits_is_never_started() -> None:
    hand = Hand(max_rows=1)
    first, gone, last = hand.add(1), hand.add(2), hand.add(3)
    hand.work(1)
    hand.worker.drop(gone)
    hand.work()
    assert hand.started == [first, last]
    assert list(hand.ended) == [first, last]
    assert hand.backbone.ticks == [[1], [1], [3], [3]]


def test_one_dropped_before_its_pictures_are_made_has_none() -> None:
    hand = Hand(decode_chunk=1)
    gone, stays = hand.add(1, 2, steps=1), hand.add(5, steps=2)
    hand.work(1)
    hand.worker.drop(gone)
    hand.work()
    assert hand.backbone.decoded == [[1], [5]]
    assert list(hand.ended) == [stays]


# What goes wrong


@pytest.mark.parametrize("bad", range(1, 9))
def test_an_image_at_fault_is_found_by_halves_and_fails_alone(bad: int) -> None:
    hand, tried = Hand(), list[list[int]]()

    def before(seeds: list[int]) -> None:
        tried.append(seeds)
        if bad in seeds:
            raise RuntimeError("secret")

    hand.backbone.before = before
    jobs = [hand.add(seed, steps=3, progress=True, **CACHE) for seed in range(1, 9)]
    hand.work(1)
    assert codes(hand) == {bad: "forward_failed"}
    assert "secret" not in error_of(hand.ended[jobs[bad - 1]]).message
    assert len(tried) == 1 + 2 * 3
    assert hand.posted[bad] == []
    assert hand.value("tick_rows_count", model="unet") == 1
    assert hand.value("denoise_steps_total", model="unet", acceleration="deepcache", kind="full") == 7
    hand.work()
    good = [job for job in jobs if job is not jobs[bad - 1]]
    assert [greys(hand.ended[job]) for job in good] == [[seed] for seed in range(1, 9) if seed != bad]
    assert all(hand.posted[job.run.seeds[0]] == [Progress(step, 3) for step in (1, 2, 3)] for job in good)
    assert hand.backbone.ticks[-2:] == [[seed for seed in range(1, 9) if seed != bad]] * 2
    assert hand.value("out_of_memory_total") == 0
    assert hand.value("feature_memory_bytes", model="unet") == 0
    assert not hand.worker.busy


def test_an_image_at_fault_takes_the_others_of_its_job_along_and_no_other_size() -> None:
    hand = Hand(max_rows=4)
    hand.backbone.before = fail_with(3, RuntimeError())
    first, bad = hand.add(1, **CACHE), hand.add(2, 3, **CACHE)
    wide = hand.add(3, width=32, height=16)  # the same seed: it fails, too, in a tick of its own
    later = hand.add(6, 2, width=32, height=16)
    hand.work()
    assert codes(hand) == {2: "forward_failed", 3: "forward_failed"}
    assert (greys(hand.ended[first]), greys(hand.ended[later])) == ([1], [6, 7])
    assert (bad in hand.ended, wide in hand.ended) == (True, True)
    assert sum(4 in tick for tick in hand.backbone.ticks) == 0, "an image whose job has failed is not tried"


def test_an_error_that_does_not_come_again_hurts_nobody() -> None:
    hand, errors = Hand(), [RuntimeError("once")]

    def before(seeds: list[int]) -> None:
        if errors:
            raise errors.pop()

    hand.backbone.before = before
    jobs = [hand.add(seed) for seed in range(1, 6)]
    hand.work()
    assert [greys(hand.ended[job]) for job in jobs] == [[seed] for seed in range(1, 6)]
    assert hand.backbone.ticks == [[1, 2, 3], [4, 5], [1, 2, 3, 4, 5]]


def test_where_all_are_at_fault_each_is_tried_alone_once() -> None:
    hand, tried = Hand(), list[int]()

    def before(seeds: list[int]) -> None:
        tried.append(len(seeds))
        raise RuntimeError

    hand.backbone.before = before
    for seed in range(1, 9):
        hand.add(seed)
    hand.work()
    assert codes(hand) == dict.fromkeys(range(1, 9), "forward_failed")
    assert sorted(tried) == [1] * 8 + [2] * 4 + [4] * 2 + [8]
    assert hand.value("tick_rows_count", model="unet") == 0


@pytest.mark.parametrize("where", ["before", "before_decode"])
def test_a_poisoned_device_is_no_place_to_try_again(where: str) -> None:
    hand, tried = Hand(), list[list[int]]()

    def before(seeds: list[int]) -> None:
        tried.append(seeds)
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    setattr(hand.backbone, where, before)
    hand.add(1, 2, steps=1)
    with pytest.raises(torch.AcceleratorError):
        hand.work(1)
    assert tried == [[1, 2]]
    assert not hand.ended


def test_a_device_that_is_poisoned_by_texts_is_no_place_to_try_again() -> None:
    hand, tried = Hand(), list[int]()

    def before(prompts: Sequence[str | None]) -> None:
        tried.append(len(prompts))
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    hand.backbone.text.before = before
    hand.add(1, prompt="a ring")
    hand.add(2, prompt="a star")
    with pytest.raises(torch.AcceleratorError):
        hand.work(1)
    assert tried == [2]


def test_a_forward_that_fails_in_the_middle_gives_the_memory_back() -> None:
    hand = Hand(max_feature_bytes=FEATURE_BYTES)
    hand.add(0, **CACHE)
    hand.work()
    hand.add(1, **CACHE)
    hand.work(1)
    assert hand.value("feature_memory_bytes", model="unet") == FEATURE_BYTES
    hand.backbone.before = fail_with(1, RuntimeError())
    hand.work(1)
    assert hand.value("feature_memory_bytes", model="unet") == 0
    after = hand.add(2, **CACHE)
    hand.work()
    assert greys(hand.ended[after]) == [2]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), MemoryError(), RuntimeError("can't allocate memory")])
def test_out_of_memory_is_known_by_any_of_its_names(error: Exception) -> None:
    hand = Hand()
    hand.backbone.before = fail_with(1, error)
    hand.add(1)
    hand.work()
    assert codes(hand) == {1: "out_of_memory"}


def test_a_tick_without_memory_is_done_in_halves_and_its_group_capped() -> None:
    hand = Hand(max_rows=7)
    hand.backbone.before = no_memory(3)
    jobs = [hand.add(seed, steps=3) for seed in range(1, 8)]
    wide = hand.add(20, 3, width=24, steps=3, share="wide")
    hand.work(1)
    assert hand.backbone.ticks == [[1, 2], [3, 4], [5, 6, 7]]
    assert hand.value("out_of_memory_total") == 2
    assert hand.backbone.parts.prompts.nbytes == 0  # what can be made again has made room
    hand.work(3)
    assert hand.backbone.ticks[3:] == [[20, 21, 22]] * 3
    hand.work(1)
    assert hand.backbone.ticks[6:] == [[1, 2]]  # 7 // 2, then 4 // 2
    hand.work()
    assert [greys(hand.ended[job]) for job in (*jobs, wide)] == [*([seed] for seed in range(1, 8)), [20, 21, 22]]
    assert hand.value("out_of_memory_total") == 2
    assert hand.backbone.ticks.count([20, 21, 22]) == 3
    for seed in range(1, 8):
        assert sum(seed in tick for tick in hand.backbone.ticks) == 3
    assert hand.value("denoise_steps_total", model="unet", acceleration="none", kind="full") == 30
    assert hand.value("tick_rows_sum", model="unet") == 30


def test_the_cap_after_out_of_memory_is_half_the_rows_that_were_tried() -> None:
    hand = Hand(max_rows=12)
    hand.backbone.before = no_memory(3)
    for seed in range(1, 5):
        hand.add(seed, steps=2, guidance_scale=2.0)
    wide = hand.add(20, 3, width=24, steps=2, guidance_scale=2.0, share="wide")
    hand.work(1)
    assert hand.backbone.ticks == [[1, 2], [3, 4]]
    hand.work(3)
    assert hand.backbone.ticks[2:] == [[20, 21, 22], [20, 21, 22], [1, 2]]
    hand.work()
    assert greys(hand.ended[wide]) == [20, 21, 22]


def test_a_cap_grows_again_once_there_is_memory() -> None:
    """Eight rows, half of the six that were tried, a quarter or one more after every 16 full ticks, and all eight."""
    hand = Hand(max_rows=8)
    hand.backbone.before = no_memory(5)
    first = [hand.add(seed, steps=1) for seed in range(1, 7)]
    hand.work()
    assert [greys(hand.ended[job]) for job in first] == [[seed] for seed in range(1, 7)]
    hand.backbone.before, before = no_memory(9), len(hand.backbone.ticks)
    hand.add(100, 40, steps=16)
    other = hand.add(30, 8, steps=1, width=24, height=16)
    hand.work()
    sizes = [len(tick) for tick in hand.backbone.ticks[before:] if tick[0] >= 100]
    caps = [3, 4, 5, 6, 7]
    assert sizes[: 16 * len(caps)] == [cap for cap in caps for _ in range(16)]
    assert sizes[16 * len(caps)] == 8
    assert [tick for tick in hand.backbone.ticks if 30 <= tick[0] < 100] == [list(range(30, 38))], "a cap is of a size"
    assert greys(hand.ended[other]) == list(range(30, 38))


def test_pools_of_features_are_given_back_where_memory_ends_and_after_every_ending() -> None:
    hand = Hand(max_rows=4)
    features = hand.backbone.features
    gone, bad = hand.add(1, steps=4, **CACHE), hand.add(2, steps=4, **CACHE)
    hand.work(1)
    assert features.reserved_bytes > 0
    hand.worker.drop(gone)
    hand.worker.drop(bad)
    hand.worker.work()
    assert features.reserved_bytes == 0

    held: list[int] = []

    def before(seeds: list[int]) -> None:
        held.append(features.reserved_bytes)
        if len(seeds) > 1:
            raise torch.OutOfMemoryError

    hand.add(3, **CACHE)
    hand.work(1)
    assert features.nbytes == FEATURE_BYTES
    hand.worker.drop(hand.started[-1])
    hand.add(4, 2, width=32, height=16)
    hand.backbone.before = before
    hand.work(1)
    assert held[0] > 0
    assert held[1] == 0, "the next attempt has what a pool held in reserve"


def test_a_cap_is_never_below_one_row() -> None:
    hand = Hand()
    hand.backbone.before = no_memory(0)
    hand.add(1, 2, steps=1)
    hand.work()
    assert codes(hand) == {1: "out_of_memory"}
    hand.backbone.before = no_memory(9)
    after = hand.add(3, 2, steps=2)
    hand.work()
    assert greys(hand.ended[after]) == [3, 4]
    assert hand.backbone.ticks == [[3], [3], [4], [4]]


def test_a_single_image_without_memory_fails_alone() -> None:
    hand = Hand()
    hand.backbone.before = fail_with(3, torch.OutOfMemoryError())
    jobs = [hand.add(seed, **CACHE) for seed in range(1, 5)]
    hand.work()
    assert error_of(hand.ended[jobs[2]]).code == "out_of_memory"
    assert [greys(hand.ended[job]) for job in jobs if job is not jobs[2]] == [[1], [2], [4]]
    assert hand.value("out_of_memory_total") == 3  # four, then two, then one
    assert hand.value("feature_memory_bytes", model="unet") == 0
    assert hand.value("denoise_steps_total", model="unet", acceleration="deepcache", kind="full") == 3


def test_an_image_whose_job_failed_in_another_half_is_not_tried() -> None:
    hand = Hand()
    hand.backbone.before = fail_with(1, torch.OutOfMemoryError())
    failed, fine = hand.add(1, 2, steps=1, progress=True), hand.add(5, 2, steps=1)
    hand.work()
    assert error_of(hand.ended[failed]).code == "out_of_memory"
    assert greys(hand.ended[fine]) == [5, 6]
    assert hand.backbone.ticks == [[5, 6]]
    assert hand.backbone.decoded == [[5, 6]]
    assert hand.posted[1] == []


def test_memory_that_ends_behind_the_forward_does_not_repeat_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler's step of the third image has no room, once: the first two have taken theirs."""
    original, trouble = exact.step, [3]

    def step(trajectory: Trajectory, prediction: torch.Tensor) -> torch.Tensor:
        if trajectory.generator.initial_seed() in trouble:
            trouble.clear()
            raise torch.OutOfMemoryError
        return original(trajectory, prediction)

    monkeypatch.setattr(exact, "step", step)
    hand = Hand()
    jobs = [hand.add(seed, steps=2, progress=True) for seed in range(1, 6)]
    hand.work()
    assert hand.backbone.ticks[:3] == [[1, 2, 3, 4, 5], [3, 4], [5]]
    assert [greys(hand.ended[job]) for job in jobs] == [[seed] for seed in range(1, 6)]
    assert hand.value("denoise_steps_total", model="unet", acceleration="none", kind="full") == 10
    assert all(hand.posted[seed] == [Progress(1, 2), Progress(2, 2)] for seed in range(1, 6))


def test_lack_of_memory_and_another_error_in_one_tick() -> None:
    hand = Hand()

    def before(seeds: list[int]) -> None:
        if len(seeds) > 2:
            raise torch.OutOfMemoryError
        if 4 in seeds:
            raise RuntimeError

    hand.backbone.before = before
    jobs = [hand.add(seed, steps=1) for seed in range(1, 5)]
    hand.work()
    assert [greys(hand.ended[job]) for job in jobs[:3]] == [[1], [2], [3]]
    assert codes(hand) == {4: "forward_failed"}
    assert hand.value("tick_rows_count", model="unet") == 1


@pytest.mark.parametrize(
    ("error", "code"), [(RuntimeError("x"), "forward_failed"), (torch.OutOfMemoryError(), "out_of_memory")]
)
@pytest.mark.parametrize("name", ["finite", "preview"])
def test_what_fails_behind_the_step_fails_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, error: Exception, code: str
) -> None:
    original = getattr(Trajectory, name)

    def failing(self: Trajectory) -> Any:
        if self.generator.initial_seed() == 3:
            raise error
        return original(self)

    monkeypatch.setattr(Trajectory, name, failing)
    hand = Hand()
    good, bad, last = hand.add(1, previews=1), hand.add(2, 3, previews=1), hand.add(7)
    hand.work()
    assert error_of(hand.ended[bad]).code == code
    assert (greys(hand.ended[good]), greys(hand.ended[last])) == ([1], [7])
    assert not hand.worker.busy


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_latents_that_are_no_numbers_fail_alone(monkeypatch: pytest.MonkeyPatch, number: float) -> None:
    original = Trajectory.moved

    def moved(self: Trajectory, state: torch.Tensor) -> None:
        original(self, state)
        if self.generator.initial_seed() == 3 and self.done:
            self.latents[..., 0, 0] = number

    monkeypatch.setattr(Trajectory, "moved", moved)
    hand = Hand()
    good, bad, last = hand.add(1), hand.add(2, 3, progress=True, **CACHE), hand.add(7)
    hand.work()
    assert error_of(hand.ended[bad]).code == "non_finite"
    assert (greys(hand.ended[good]), greys(hand.ended[last])) == ([1], [7])
    assert hand.backbone.decoded == [[1, 7]]
    assert hand.posted[2] == [Progress(3, 6)]
    assert hand.value("feature_memory_bytes", model="unet") == 0


def test_pictures_that_cannot_be_decoded_answer_their_jobs_with_the_time() -> None:
    hand = Hand()
    hand.backbone.before_decode = fail_with(2, RuntimeError("secret"))
    jobs: list[Job] = [hand.add(1, steps=1), hand.add(2, 2, steps=1), hand.add(4, steps=1), hand.add(5, steps=1)]
    hand.work()
    assert codes(hand) == {2: "forward_failed"}
    assert [greys(hand.ended[job]) for job in (jobs[0], *jobs[2:])] == [[1], [4], [5]]
    assert jobs[1].timing.finished == hand.clock.now


# What may start


def test_who_remembers_more_than_there_is_waits_for_those_before() -> None:
    hand = Hand(max_feature_bytes=3 * FEATURE_BYTES - 1)
    hand.add(0, 2, steps=3, **CACHE)  # of a new kind: nothing is known, all of it starts
    hand.work(1)
    assert hand.backbone.ticks == [[0, 1]]
    second, third, free = hand.add(2, 2, steps=3, **CACHE), hand.add(4, steps=7, **CACHE), hand.add(6)
    hand.work(1)
    assert hand.backbone.ticks[1:] == [[6, 0, 1]]  # one who remembers nothing passes
    hand.work(1)
    assert hand.backbone.ticks[2:] == [[6, 0, 1]]
    hand.work(1)
    assert hand.backbone.ticks[3:] == [[2, 3]]
    hand.work()
    assert hand.backbone.ticks[4:] == [[2, 3], [2, 3], *[[4]] * 7]
    assert [greys(hand.ended[job]) for job in (second, third, free)] == [[2, 3], [4], [6]]
    assert hand.value("feature_memory_bytes", model="unet") == 0


def test_what_is_remembered_is_set_aside_while_an_image_may_need_it_again() -> None:
    """Between its full steps an image holds nothing, and yet nobody takes its room."""
    hand = Hand(max_feature_bytes=FEATURE_BYTES)
    hand.add(0, steps=5, **CACHE)
    hand.work(2)
    assert hand.value("feature_memory_bytes", model="unet") == 0
    hand.add(1, steps=2, **CACHE)
    hand.work()
    assert hand.backbone.ticks == [[0]] * 5 + [[1]] * 2


def test_a_job_of_several_images_takes_its_room_once() -> None:
    hand = Hand(max_feature_bytes=3 * FEATURE_BYTES)
    hand.add(0, **CACHE)
    hand.work()
    for seed, images in ((1, 2), (3, 1), (4, 1)):
        hand.add(seed, images, steps=4 // images, **CACHE)
    hand.work(1)
    assert hand.backbone.ticks[-1] == [1, 2, 3]


def test_what_an_image_will_remember_is_set_aside_from_its_start() -> None:
    """Guided, and so with twice as much to remember, on the second half of its steps only."""
    late: dict[str, Any] = {
        "steps": 8,
        "guidance_scale": 2.0,
        "acceleration": [DeepCache(interval=2), SelectiveGuidance(start=0.5, stop=1.0)],
    }
    hand = Hand(max_feature_bytes=3 * FEATURE_BYTES)
    hand.add(0, **late)
    hand.work()
    hand.add(1, **late)
    hand.work(1)
    assert hand.value("feature_memory_bytes", model="unet") == FEATURE_BYTES
    hand.add(2, **late)
    hand.work()
    assert hand.backbone.ticks[8:] == [[1]] * 8 + [[2]] * 8


def test_the_gauge_of_features_is_by_model() -> None:
    hand = Hand({"unet": FakeBackbone(), "other": FakeBackbone()})
    hand.add(1, 2, steps=4, guidance_scale=2.0, **CACHE)
    hand.add(5, steps=4, model="other", share="other", **CACHE)
    hand.work(2)
    assert hand.value("feature_memory_bytes", model="unet") == 4 * FEATURE_BYTES
    assert hand.value("feature_memory_bytes", model="other") == FEATURE_BYTES
    hand.work(4)
    assert hand.value("feature_memory_bytes", model="unet") == 0


def test_nothing_is_posted_by_a_worker_to_one_who_asked_for_nothing() -> None:
    hand = Hand()
    job = hand.add(1, 2)
    hand.work()
    events: list[Event] = hand.posted[1]
    assert events == []
    assert greys(hand.ended[job]) == [1, 2]


def test_plain_ticks_of_the_models_own_size_choose_the_rows_of_the_next() -> None:
    hand = Hand(max_rows=2)
    seen: list[int] = []

    class Chosen(Rows):
        """Notes what it is shown, and lets one row more at each."""

        def observe(self, rows: int, seconds: float) -> int:
            seen.append(rows)
            self.cap = rows + 1
            return self.cap

    hand.pace.rows["unet"] = Chosen({2: 1.0}, lambda costs: None)
    for seed in range(1, 8):
        hand.add(seed, steps=1)
    hand.work()
    assert seen == [2, 3, 2]
    assert [len(tick) for tick in hand.backbone.ticks] == [2, 3, 2]
    hand.add(9, steps=1, width=24)
    hand.add(10, steps=2, **CACHE)
    hand.work()
    assert seen == [2, 3, 2, 1], "another size tells nothing, nor does a step that is not a full one"
