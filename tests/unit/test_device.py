"""What errors say of the device, and that `auto` is the precision that is faster on this processor."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from models import device

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unmeasured() -> Iterator[None]:
    device._matmul_ratio.cache_clear()
    yield
    device._matmul_ratio.cache_clear()


@pytest.mark.parametrize(("slower", "expected"), [(torch.bfloat16, False), (torch.float32, True)])
def test_the_faster_precision_is_found(slower: torch.dtype, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def linear(x: torch.Tensor, weight: torch.Tensor) -> None:
        nonlocal now
        now += 2.0 if x.dtype == slower else 1.0

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    assert device.fast_bfloat16(CPU) is expected


def test_a_processor_without_the_instructions_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(device, "_matmul_ratio", lambda: pytest.fail("measured"))
    assert not device.fast_bfloat16(CPU)


@pytest.mark.parametrize(
    ("error", "no_memory", "poisoned"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True, False),
        (MemoryError(), True, False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True, False),
        (torch.AcceleratorError("CUDA error: out of memory"), True, False),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False, True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False, True),
        (RuntimeError("shape mismatch"), False, False),
        (ValueError("a bug"), False, False),
    ],
)
def test_what_an_error_says_of_the_device(error: Exception, no_memory: bool, poisoned: bool) -> None:
    assert device.out_of_memory(error) is no_memory
    assert device.poisons(error) is poisoned


def test_the_heap_says_what_is_used_and_what_is_kept() -> None:
    if not (before := device.heap_bytes()):
        pytest.skip("the C library does not say")
    block = torch.ones(2**26, dtype=torch.uint8)  # so large that nothing else in the process comes near
    held = device.heap_bytes()
    assert held["used"] - before["used"] >= 2**25
    del block
    assert held["used"] - device.heap_bytes()["used"] >= 2**25
