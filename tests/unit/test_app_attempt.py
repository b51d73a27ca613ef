"""What is kept of an exception: the frames of one for lack of memory hold the very tensors that are in its way."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from app.engine.attempt import attempt, bisect


class Tensors:
    """What a frame holds."""


@pytest.mark.parametrize(("error", "kept"), [(torch.OutOfMemoryError("full"), False), (ValueError("a bug"), True)])
def test_the_frames_of_an_error(error: Exception, kept: bool) -> None:
    held: list[weakref.ref[Tensors]] = []

    def work() -> None:
        tensors = Tensors()
        held.append(weakref.ref(tensors))
        raise error

    caught = attempt(work)
    assert caught is error
    gc.collect()
    assert (held[0]() is not None) is kept
    assert (caught.__traceback__ is not None) is kept


def test_what_goes_well_is_none() -> None:
    done: list[int] = []
    assert attempt(lambda: done.append(1)) is None
    assert done == [1]


def test_what_is_no_error_passes() -> None:
    def work() -> None:
        raise SystemExit

    with pytest.raises(SystemExit):
        attempt(work)


def test_what_poisons_the_device_passes() -> None:
    def work() -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    with pytest.raises(torch.AcceleratorError):
        attempt(work)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 33])
def test_halves_find_who_is_at_fault_in_few_attempts_and_do_the_others_once(count: int) -> None:
    for bad in range(count):
        done: list[int] = []

        def work(part: list[int], bad: int = bad, done: list[int] = done) -> None:
            if bad in part:
                raise ValueError
            done.extend(part)

        def undone(part: list[int], done: list[int] = done) -> list[int]:
            return [item for item in part if item not in done]

        tried = list(bisect(range(count), work, undone))
        assert [part for part, error in tried if error is not None][-1] == [bad]
        assert sorted(done) == [item for item in range(count) if item != bad]
        assert len(tried) <= 1 + 2 * (count - 1).bit_length()


def test_what_was_done_before_an_error_is_not_done_again() -> None:
    done: list[int] = []

    def work(part: list[int]) -> None:
        for item in part:
            if item == 2 and len(part) > 1:
                raise ValueError
            done.append(item)

    parts = [part for part, _ in bisect(range(5), work, lambda part: [item for item in part if item not in done])]
    assert parts == [[0, 1, 2, 3, 4], [2, 3], [2], [3], [4]]
    assert done == [0, 1, 2, 3, 4]
