"""Products of dense weights whose order of summation depends on the weight's shape alone.

cuBLAS chooses tiles, and into how many parts it splits the inputs, by the number of rows; here both
are fixed. Errors as those of grouped_matmul.py."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sapwood.kernels.triton.grouped_matmul import _multiply

_INPUTS = 64


@triton.jit(do_not_specialize=["rows"])
def _dense_matmul(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, num_out, num_in, x_stride, weight_stride,
    out_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_outputs = m < rows, n < num_out
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :]
    weight_ptrs = weight_ptr + n.to(tl.int64)[None, :] * weight_stride + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, num_in, BLOCK_K):
        inside = first + k < num_in
        x = tl.load(x_ptrs + first, mask=in_rows[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weight_ptrs + first, mask=inside[:, None] & in_outputs[None, :], other=0.0)
        total = _multiply(x, weight, total)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=in_outputs, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * out_stride + n[None, :]
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=in_rows[:, None] & in_outputs[None, :])


def dense_matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, sizes: tuple[int, int, int]
) -> None:
    """Fill out [T, out] (of a float dtype) with x @ weight.T + bias.

    x       [T, in], weight [out, in], both of one float dtype; inputs lie together
    sizes   (rows, outputs, warps) of a program's tile"""
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    rows, num_in = x.shape
    num_out = weight.shape[0]
    block_m, block_n, num_warps = sizes
    _dense_matmul[(triton.cdiv(num_out, block_n), triton.cdiv(rows, block_m))](
        x, weight, bias, out, rows, num_out, num_in, x.stride(0), weight.stride(0), out.stride(0),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=_INPUTS, num_warps=num_warps, num_stages=3,
    )  # fmt: skip
