"""What a service asks of the device besides a forward: is this out of memory, how much is in use, how many threads."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""glibc's numbers of what `mallopt` sets, in bytes."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one GPU: this process's tensors, its reserved pool and peak, and the whole card's use and size."""

    device: str
    allocated: int
    reserved: int
    peak: int
    used: int
    total: int


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device (or the host) had no memory left.

    Beside torch's allocator, the driver itself may say so; that harms nothing else.
    """
    if isinstance(error, torch.AcceleratorError):
        return "out of memory" in str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def poisons(error: BaseException) -> bool:
    """Whether the device can do nothing more in this process: a kernel that failed on a GPU takes its context along."""
    return isinstance(error, torch.AcceleratorError) and not out_of_memory(error)


def release_memory() -> None:
    """Give cached device memory back, so that the next attempt finds it in one piece."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def device_memory() -> list[DeviceMemory]:
    """The memory of each GPU in use by this process; none where there is no GPU."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        allocated, reserved = torch.cuda.memory_allocated(i), torch.cuda.memory_reserved(i)
        peak = torch.cuda.max_memory_allocated(i)
        found.append(DeviceMemory(f"cuda:{i}", allocated, reserved, peak, total - free, total))
    return found


def upload(values: Sequence[int] | Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers [n] on the device, without waiting for it."""
    t = torch.tensor(values, dtype=dtype)
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


def download(t: Tensor) -> Any:
    """The numbers of a small tensor, in nested lists. This waits for the device."""
    return t.tolist()


def find_device(name: str | torch.device) -> torch.device:
    """The device of this name; `auto` is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 here: a GPU says so itself, a CPU is measured.

    Processors with the same instructions for bfloat16 multiply it in half of float32's time, or in twice.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported()) and _matmul_ratio() < 0.9


def auto_dtype(device: torch.device) -> torch.dtype:
    """What `dtype="auto"` is on a device: bfloat16 where that is faster, else float32."""
    return torch.bfloat16 if fast_bfloat16(device) else torch.float32


@cache
def _matmul_ratio() -> float:
    """The time of a matrix product in bfloat16 over that in float32, the best of ten in turns: about 0.2 s, once."""
    pairs = {
        d: (torch.ones(1024, 512, dtype=d), torch.ones(512, 512, dtype=d)) for d in (torch.bfloat16, torch.float32)
    }
    best = dict.fromkeys(pairs, float("inf"))
    for _ in range(10):
        for dtype, (x, weight) in pairs.items():
            began = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            best[dtype] = min(best[dtype], time.perf_counter() - began)
    return best[torch.bfloat16] / best[torch.float32]


def keep_freed_memory() -> None:
    """Let glibc keep what operators free, for the next ones, in place of handing it back to the system each time.

    For a process that computes on a CPU; does nothing where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, size in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            mallopt(parameter, size)


def give_back_freed_memory() -> None:
    """Hand what glibc has kept of freed memory, in all its arenas, back to the system; some milliseconds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`: ten numbers, of which 4 is what was mapped alone, 7 what is used, 8 what is free."""

    _fields_ = [(f"field_{i}", ctypes.c_size_t) for i in range(10)]


def heap_bytes() -> dict[str, int]:
    """What glibc's allocator has: `used` by the program, and `kept` free for its next use. Empty for another library.

    Where resident memory stays high, `used` tells what the program holds, and `kept` what `give_back_freed_memory` can
    give back.
    """
    look = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if look is None:
        return {}
    look.restype = _MallInfo
    info = look()
    return {"used": info.field_4 + info.field_7, "kept": info.field_8}


def set_threads(count: int) -> None:
    """Let operators of the calling thread use `count` CPU cores."""
    torch.set_num_threads(count)


def thread_count() -> int:
    """How many CPU cores operators of the calling thread use."""
    return torch.get_num_threads()


def wait(device: torch.device) -> None:
    """Wait until the device has done what was asked of it; for measuring."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Fence:
    """Lets the host prepare one tick while the device computes another, and no more: `mark` after each tick.

    Without it a host that never waits would queue work without end, and neither a departure nor a new arrival would
    take effect for as long as the queue is.
    """

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None

    def mark(self, device: torch.device) -> None:
        """Wait for the tick before this one; on a CPU every tick is done when it returns."""
        if device.type != "cuda":
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        if self._last is not None:
            self._last.synchronize()
        self._last = event
