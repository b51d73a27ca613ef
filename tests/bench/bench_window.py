"""The time banded self-attention saves over full attention here, as JSON: `python -m tests.bench.bench_window`."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from models.networks.window import window_attention

CASES = ((1024, 128, 1.7), (4096, 512, 2.0))
"""Tokens, half width of the band, and how many times faster it must be."""


def seconds(attention: Callable[[], object], repeats: int) -> float:
    """The median time of a call, after one to warm up."""
    attention()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        attention()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.inference_mode()
def measure(tokens: int, window: int, rows: int = 2, heads: int = 16, dim: int = 72, repeats: int = 9) -> float:
    """Full attention's time over the band's, for the shapes of DiT-XL/2 and PixArt."""
    query, key, value = torch.randn(3, rows, heads, tokens, dim)
    full = seconds(lambda: F.scaled_dot_product_attention(query, key, value), repeats)
    return full / seconds(lambda: window_attention(query, key, value, window), repeats)


if __name__ == "__main__":
    results = [
        {"tokens": tokens, "window": window, "speedup": round(measure(tokens, window), 2), "wanted": wanted}
        for tokens, window, wanted in CASES
    ]
    print(json.dumps({"threads": torch.get_num_threads(), "window_attention": results}, indent=2))
