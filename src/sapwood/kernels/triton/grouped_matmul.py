"""Products of unrounded activations and weights of 4 or 8 bits, which are decoded on their way to
the matrix units: w = ((value of a code) + shift) * scale + minimum, times an output's scale.

Without the output's scale the weight is computed in fp32 and rounded to the dtype of x, as a dense
model of that dtype would have it; the sums are fp32. Compared with the fp32 product of such a
weight, the error is 1e-5 of the largest entry in fp32, and one rounding of the result in 16 bits.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import triton
import triton.language as tl
from torch import Tensor

from sapwood.kernels.triton.small_floats import decode
from sapwood.kernels.triton.tiles import TileChoice

Values = Literal["int8", "e4m3", "int4", "fp4", "table"]

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@dataclass(frozen=True, slots=True, eq=False)
class GroupedWeight:
    """A weight [out, in] whose bytes lie so that the outputs of a block of inputs are neighbours:
    then a program's tile is one piece of memory. Made by kernels/triton/packing.py.

    values        what codes stand for: int8 and e4m3 their own bits (the latter finite or NaN),
                  int4 code - zero, fp4 E2M1, table table[code]
    shape         [out, in]
    numbers       [blocks, out, bytes] uint8: blocks of 2^n inputs, what is beyond `in` is any
                  finite number. 4 bits: byte i has input i in its low half, and in its high half
                  the one half a block later
    group_inputs  inputs that share a scale; 0: there are no scales of groups
    scales        [groups, out] of a float dtype; unused without groups
    shifts        likewise, or None: 0
    minima        likewise, or None: 0
    out_scales    [out] fp32, or None: 1
    table         [16] fp32 for values "table"
    zero          for values "int4"
    """

    values: Values
    shape: tuple[int, int]
    numbers: Tensor
    group_inputs: int = 0
    scales: Tensor | None = None
    shifts: Tensor | None = None
    minima: Tensor | None = None
    out_scales: Tensor | None = None
    table: Tensor | None = None
    zero: int = 0

    @property
    def bits(self) -> int:
        return 8 if self.values in ("int8", "e4m3") else 4

    @property
    def block_inputs(self) -> int:
        return self.numbers.shape[2] * 8 // self.bits

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight in the device's memory."""
        parts = (self.numbers, self.scales, self.shifts, self.minima, self.out_scales, self.table)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


@triton.jit
def _multiply(x, weight, total):
    if _INTERPRETED:
        # The interpreter multiplies bfloat16's bits as if they were whole numbers.
        x, weight = x.to(tl.float32), weight.to(tl.float32)
    return tl.dot(x, weight, total, input_precision="ieee")


@triton.jit
def _value(code, table_ptr, VALUES: tl.constexpr, ZERO: tl.constexpr):
    """The fp32 values of codes (uint8)."""
    bits = code.to(tl.int32)
    if VALUES == "int8":
        value = code.to(tl.int8, bitcast=True).to(tl.float32)
    elif VALUES == "int4":
        value = (bits - ZERO).to(tl.float32)
    elif VALUES == "table":
        value = tl.load(table_ptr + bits)
    elif VALUES == "fp4":
        value = decode(bits, 4, 1, 1)
    else:
        value = tl.where((bits & 127) == 127, float("nan"), decode(bits, 8, 3, 7))
    return value


@triton.jit
def _of_groups(
    ptr, first, column, n, in_outputs, num_out, num_in, GROUP: tl.constexpr, WIDTH: tl.constexpr
):
    """Scales, shifts or minima of WIDTH inputs from `first` on: [1, N] where these are of one
    group, else [WIDTH, N]."""
    # Beyond the inputs there may be no group.
    if GROUP % WIDTH == 0:
        group = tl.minimum(first, num_in - 1) // GROUP
        numbers = tl.load(ptr + group * num_out + n, mask=in_outputs, other=0.0)[None, :]
    else:
        group = tl.minimum(first + column, num_in - 1) // GROUP
        place = (group * num_out)[:, None] + n[None, :]
        numbers = tl.load(ptr + place, mask=in_outputs[None, :], other=0.0)
    return numbers.to(tl.float32)


@triton.jit
def _weight(
    code, table_ptr, scales_ptr, shifts_ptr, minima_ptr,
    first, column, n, in_outputs, num_out, num_in,
    VALUES: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    weight = _value(code, table_ptr, VALUES, ZERO)
    if shifts_ptr is not None:
        weight += _of_groups(
            shifts_ptr, first, column, n, in_outputs, num_out, num_in, GROUP, WIDTH
        )
    if GROUP != 0:
        weight *= _of_groups(
            scales_ptr, first, column, n, in_outputs, num_out, num_in, GROUP, WIDTH
        )
    if minima_ptr is not None:
        weight += _of_groups(
            minima_ptr, first, column, n, in_outputs, num_out, num_in, GROUP, WIDTH
        )
    return weight


@triton.jit(do_not_specialize=["rows"])
def _grouped_matmul(
    x_ptr,
    numbers_ptr,
    scales_ptr,
    shifts_ptr,
    minima_ptr,
    out_scales_ptr,
    table_ptr,
    bias_ptr,
    out_ptr,
    rows,
    num_out,
    num_in,
    num_blocks,
    x_stride,
    out_stride,
    VALUES: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
):
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_outputs = m < rows, n < num_out
    width: tl.constexpr = BLOCK_K * BITS // 8  # inputs at a time, and bytes of a block
    column = tl.arange(0, width)
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * x_stride + column[None, :]
    number_ptrs = numbers_ptr + n[None, :] * width + column[:, None]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in tl.range(0, num_blocks, loop_unroll_factor=UNROLL):
        number = tl.load(number_ptrs, mask=in_outputs[None, :], other=0)
        number_ptrs += num_out * width
        for part in tl.static_range(8 // BITS):
            first = block * BLOCK_K + part * width
            code = number
            if BITS == 4:
                code = (number >> (4 * part)) & 15
            weight = _weight(
                code, table_ptr, scales_ptr, shifts_ptr, minima_ptr,
                first, column, n, in_outputs, num_out, num_in, VALUES, ZERO, GROUP, width,
            )  # fmt: skip
            mask = in_rows[:, None]
            if not WHOLE_BLOCKS:
                mask = mask & (first + column < num_in)[None, :]
            x = tl.load(x_ptrs + first, mask=mask, other=0.0)
            total = _multiply(x, weight.to(dtype), total)
    if out_scales_ptr is not None:
        total *= tl.load(out_scales_ptr + n, mask=in_outputs, other=0.0)[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=in_outputs, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * out_stride + n[None, :]
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=in_rows[:, None] & in_outputs[None, :])


def grouped_matmul(
    x: Tensor, weight: GroupedWeight, bias: Tensor | None, out: Tensor, tiles: TileChoice
) -> None:
    """Fill out [T, out] (of a float dtype; rows may be apart) with x @ weight.T + bias.

    x  [T, in] bf16, fp16 or fp32"""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, num_in = x.shape
    num_out = weight.shape[0]
    block_m, block_n, num_warps = tiles.of(rows)
    block_k = weight.block_inputs
    # With few rows, the time depends on how many bytes of the weight are on their way at once.
    unroll = max(1, 128 // block_k) if block_m == 16 else 1
    _grouped_matmul[(triton.cdiv(num_out, block_n), triton.cdiv(rows, block_m))](
        x, weight.numbers, weight.scales, weight.shifts, weight.minima, weight.out_scales,
        weight.table, bias, out,
        rows, num_out, num_in, weight.numbers.shape[0], x.stride(0), out.stride(0),
        VALUES=weight.values, BITS=weight.bits, ZERO=weight.zero, GROUP=weight.group_inputs,
        BLOCK_K=block_k, WHOLE_BLOCKS=num_in % block_k == 0,
        BLOCK_M=block_m, BLOCK_N=block_n, UNROLL=unroll, num_warps=num_warps,
        num_stages=5 if block_m == 16 else 3,
    )  # fmt: skip
