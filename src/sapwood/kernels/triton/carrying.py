"""Copies of rows between the host's page-locked memory and the device's.

The device reads and writes the host's memory itself, so that any number of rows is one launch."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from sapwood.kernels.transfer import upload

BLOCK = 2048
_WORD = 8


@triton.jit
def _carry_rows(
    source_ptr,
    target_ptr,
    from_rows_ptr,
    to_rows_ptr,
    source_stride,
    target_stride,
    width,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    read = tl.load(from_rows_ptr + pair) * source_stride
    written = tl.load(to_rows_ptr + pair) * target_stride
    values = tl.load(source_ptr + read + column, mask=inside)
    tl.store(target_ptr + written + column, values, mask=inside)


def carry_rows(
    source: Tensor, target: Tensor, from_rows: Sequence[int], to_rows: Sequence[int]
) -> None:
    """As Kernels.carry_rows."""
    if source.shape[1] != target.shape[1] or len(from_rows) != len(to_rows):
        raise ValueError(f"{source.shape} with {len(from_rows)} rows does not fit {target.shape}")
    if not from_rows:
        return
    device = target.device if source.is_cpu else source.device
    numbers = [np.asarray(rows, dtype=np.int64) for rows in (from_rows, to_rows)]
    read, written = upload(numbers, device)
    source, target = _as_words(source, target)
    width = source.shape[1]
    _carry_rows[(len(from_rows), triton.cdiv(width, BLOCK))](
        source, target, read, written, source.stride(0), target.stride(0), width, BLOCK=BLOCK
    )


def _as_words(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same memory as words of 8 bytes, if all rows begin and end with whole words."""
    for rows in tensors:
        places = rows.stride(0), rows.shape[1], rows.data_ptr()
        if any(place % _WORD for place in places) or rows.storage_offset() % _WORD:
            return tensors
    return tuple(rows.view(torch.int64) for rows in tensors)
