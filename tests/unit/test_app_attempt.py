"""What is kept of an exception: the frames of one for lack of memory hold the very tensors that are in its way."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from app.engine.attempt import attempt


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
