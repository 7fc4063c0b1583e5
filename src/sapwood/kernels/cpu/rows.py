"""Copies of rows: checks, and then one call into C++."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from sapwood.kernels.cpu import _native
from sapwood.kernels.cpu.tensors import describe


def carry_rows(
    context: _native.Context,
    source: Tensor,
    target: Tensor,
    from_rows: Sequence[int],
    to_rows: Sequence[int],
) -> None:
    """As Kernels.carry_rows, with all threads."""
    for rows, numbers in ((source, from_rows), (target, to_rows)):
        if rows.dtype.itemsize != 1 or not rows.is_cpu or rows.stride(1) != 1:
            raise ValueError(f"{describe(rows)} on {rows.device} are no rows of bytes on a CPU")
        if not all(0 <= number < len(rows) for number in numbers):
            raise ValueError(f"{describe(rows)} has not all of the rows {list(numbers)}")
    if source.shape[1] != target.shape[1] or len(from_rows) != len(to_rows):
        raise ValueError(f"{describe(source)} does not fit {describe(target)}")
    pairs = np.array([from_rows, to_rows], dtype=np.int64)
    _native.carry_rows(
        context, source.data_ptr(), source.stride(0), target.data_ptr(), target.stride(0),
        source.shape[1], pairs.ctypes.data, len(from_rows),
    )  # fmt: skip
