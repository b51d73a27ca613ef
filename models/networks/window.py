"""Banded self-attention that does less work than full attention: every token sees |i - j| <= w, in raster order."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def chunks(tokens: int, window: int) -> list[tuple[int, int, int, int]]:
    """Cut queries into slices [q0, q1) with the key slice [k0, k1) that their bands reach.

    Slices of one band's width balance the keys wasted in the corners of a slice against the number of calls.
    """
    size = max(32, window)
    starts = range(0, tokens, size)
    return [
        (q0, min(q0 + size, tokens), max(0, q0 - window), min(min(q0 + size, tokens) + window, tokens)) for q0 in starts
    ]


@lru_cache(maxsize=64)
def _mask(q0: int, q1: int, k0: int, k1: int, window: int, device: torch.device) -> Tensor:
    queries = torch.arange(q0, q1, device=device)[:, None]
    keys = torch.arange(k0, k1, device=device)[None, :]
    return (queries - keys).abs() <= window  # [q1 - q0, k1 - k0]


def window_attention(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Attention of [rows, heads, tokens, dim] in a band of 2 * window + 1 keys; the same shape comes back.

    On CUDA in half precision this is torch's variable-length flash attention with its own window; elsewhere scaled
    dot-product attention over slices of queries, each with the keys its band reaches.
    """
    tokens = query.shape[2]
    if window >= tokens - 1:
        return F.scaled_dot_product_attention(query, key, value)
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return _flash_window(query, key, value, window)
    out = [
        F.scaled_dot_product_attention(
            query[:, :, q0:q1],
            key[:, :, k0:k1],
            value[:, :, k0:k1],
            attn_mask=_mask(0, q1 - q0, k0 - q0, k1 - q0, window, query.device),
        )
        for q0, q1, k0, k1 in chunks(tokens, window)
    ]
    return torch.cat(out, dim=2)


def _flash_window(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, tokens, dim = query.shape
    q, k, v = (t.transpose(1, 2).reshape(rows * tokens, heads, dim) for t in (query, key, value))
    offsets = _offsets(rows, tokens, query.device)
    out = varlen_attn(q, k, v, offsets, offsets, tokens, tokens, window_size=(window, window))
    assert isinstance(out, Tensor)  # noqa: S101  (a tuple only where auxiliary outputs are asked for)
    return out.view(rows, tokens, heads, dim).transpose(1, 2)


@lru_cache(maxsize=64)
def _offsets(rows: int, tokens: int, device: torch.device) -> Tensor:
    return torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32, device=device)
