"""Attention of every token to all tokens of its text, in C++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sapwood.kernels.cpu import _native
from sapwood.kernels.cpu.tensors import describe, dtype_of
from sapwood.kernels.texts import EqualTexts


def attend_both_ways(
    context: _native.Context,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    texts: Sequence[EqualTexts],
    scale: float,
) -> Tensor:
    """As Kernels.bidirectional_attention; only a token's heads must lie in a row.

    Raises ValueError if the shapes of q, k and v differ, IndexError if a text has rows that are no
    tokens."""
    dtype = dtype_of(q)
    for other in (k, v):
        if other.shape != q.shape or other.dtype != q.dtype:
            raise ValueError(f"keys or values {describe(other)} do not fit queries {describe(q)}")
    out = torch.empty(q.shape, dtype=q.dtype)
    if not len(q):
        return out
    q, k, v = map(_in_rows, (q, k, v))
    num_tokens, num_heads, head_dim = q.shape
    rows = [text for group in texts for text in _rows_of(group, num_tokens)]
    _native.attend_both_ways(
        context, dtype, (q.data_ptr(), k.data_ptr(), v.data_ptr()),
        (q.stride(0), k.stride(0), v.stride(0)), (num_tokens, num_heads, head_dim), scale, rows,
        out.data_ptr(),
    )  # fmt: skip
    return out


def _in_rows(x: Tensor) -> Tensor:
    """x, copied if the heads of a token do not lie one after the other."""
    _, num_heads, head_dim = x.shape
    heads_stride = x.stride(1) if num_heads > 1 else head_dim
    entry_stride = x.stride(2) if head_dim > 1 else 1
    return x if (heads_stride, entry_stride) == (head_dim, 1) else x.contiguous()


def _rows_of(group: EqualTexts, num_tokens: int) -> list[tuple[int, int, int]]:
    """(address of its rows or 0, its first token, its length) of each text."""
    length = group.length
    if group.rows is None:
        return [(0, first, length) for first in range(0, num_tokens, length)]
    rows = group.rows
    if rows.dtype != torch.int64 or not rows.is_contiguous() or not rows.is_cpu:
        raise ValueError(f"rows of texts {describe(rows)} must be contiguous int64 on a CPU")
    if len(rows) % length:
        raise ValueError(f"{len(rows)} rows are no whole texts of {length} tokens")
    address = rows.data_ptr()
    return [(address + 8 * first, 0, length) for first in range(0, len(rows), length)]
