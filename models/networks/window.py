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


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, window: int, text: tuple[int, int] = (0, 0), mask: Tensor | None = None
) -> Tensor:
    """Attention of [rows, heads, tokens, dim] in a band of 2 * window + 1 keys; the same shape comes back.

    Tokens [start, stop) of `text`, at one end, see all and are seen by all (the arrow of DiTFastAttnV2,
    arXiv:2503.22796). `mask` [rows, 1, 1, tokens] is true for keys that count.

    On CUDA in half precision this is torch's variable-length flash attention with its own window; elsewhere, and with
    text, scaled dot-product attention over slices of queries, each with the keys its band reaches.
    """
    tokens, (start, stop) = query.shape[2], text
    if window >= tokens - (stop - start) - 1:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    if start < stop:
        return _arrow(query, key, value, window, text, mask)
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


def _arrow(
    query: Tensor, key: Tensor, value: Tensor, window: int, text: tuple[int, int], mask: Tensor | None
) -> Tensor:
    """In a band among the image's tokens, and between these and the text in full."""
    start, stop = text
    first = stop if start == 0 else 0  # of the image's tokens
    seen = key.new_ones(1, 1, 1, key.shape[2], dtype=torch.bool) if mask is None else mask
    out = []
    for q0, q1, k0, k1 in chunks(query.shape[2] - (stop - start), window):
        keys, values, counted = (
            torch.cat([t.narrow(dim, start, stop - start), t.narrow(dim, first + k0, k1 - k0)], dim)
            for t, dim in ((key, 2), (value, 2), (seen, 3))
        )
        band = F.pad(_mask(0, q1 - q0, k0 - q0, k1 - q0, window, query.device), (stop - start, 0), value=True)
        queries = query[:, :, first + q0 : first + q1]
        out.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=band & counted))
    words = F.scaled_dot_product_attention(query[:, :, start:stop], key, value, attn_mask=mask)
    return torch.cat([words, *out] if start == 0 else [*out, words], dim=2)


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
