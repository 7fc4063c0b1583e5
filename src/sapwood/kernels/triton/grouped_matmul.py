"""Products of activations as they are and weights of 4 or 8 bits, whose groups of inputs have a
scale and, maybe, a minimum: w = number * scale + minimum.

The weight is computed in fp32 and rounded to the dtype of x, as a dense model of that dtype would
have it; the sums are fp32. Errors against the product with such a weight in fp32, of the largest
entry: 1e-5 in fp32, one rounding of the result in the others."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapwood.kernels.triton.scaled_matmul import tile

GROUP_INPUTS = (32, 64, 128)

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@dataclass(frozen=True, slots=True, eq=False)
class GroupedWeight:
    """A weight [out, in] whose bytes lie so that the outputs of a group are neighbours: then a
    program's tile is one piece of memory.

    numbers  8 bits: [groups, out, group_inputs] int8; 4 bits: [groups, out, group_inputs / 2]
             uint8, where in each 32 inputs byte i holds number i in its low half and number 16 + i
             in its high half, as in GGUF's blocks
    scales   [groups, out] of a float dtype
    minima   likewise, or None where there are none: then w = (number - zero) * scale
    zero     what 4-bit numbers are counted from where there are no minima
    Raises   ValueError if they do not fit
    """

    bits: int
    group_inputs: int
    numbers: Tensor
    scales: Tensor
    minima: Tensor | None
    zero: int = 0

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.group_inputs not in GROUP_INPUTS:
            raise ValueError(
                f"weights have 4 or 8 bits and groups of {', '.join(map(str, GROUP_INPUTS))} "
                f"inputs, not {self.bits} bits and {self.group_inputs} inputs"
            )
        groups, num_out, _ = self.numbers.shape
        wanted = (groups, num_out, self.group_inputs * self.bits // 8)
        dtype = torch.int8 if self.bits == 8 else torch.uint8
        others = [one.shape for one in (self.scales, self.minima) if one is not None]
        fits = all(tuple(shape) == (groups, num_out) for shape in others)
        if tuple(self.numbers.shape) != wanted or self.numbers.dtype != dtype or not fits:
            raise ValueError(
                f"numbers {self.numbers.dtype} {list(self.numbers.shape)} must be {dtype} "
                f"{list(wanted)}, scales and minima {[groups, num_out]}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]"""
        return self.numbers.shape[1], self.numbers.shape[0] * self.group_inputs


@triton.jit
def _multiply(x, weight, total):
    if _INTERPRETED:
        # The interpreter multiplies bfloat16's bits as if they were whole numbers.
        x, weight = x.to(tl.float32), weight.to(tl.float32)
    return tl.dot(x, weight, total, input_precision="ieee")


@triton.jit(do_not_specialize=["rows"])
def _grouped_matmul(
    x_ptr,
    numbers_ptr,
    scales_ptr,
    minima_ptr,
    bias_ptr,
    out_ptr,
    rows,
    num_out,
    num_groups,
    x_stride,
    out_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
):
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_outputs = m < rows, n < num_out
    num_bytes: tl.constexpr = GROUP * BITS // 8
    byte = tl.arange(0, num_bytes)
    column = byte if BITS == 8 else byte // 16 * 32 + byte % 16
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * x_stride + column[None, :]
    number_ptrs = numbers_ptr + n[None, :] * num_bytes + byte[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in tl.range(0, num_groups, loop_unroll_factor=UNROLL):
        at = group * num_out
        number = tl.load(number_ptrs, mask=in_outputs[None, :], other=0)
        number_ptrs += num_out * num_bytes
        scale = tl.load(scales_ptr + at + n, mask=in_outputs, other=0.0).to(tl.float32)[None, :]
        if HAS_MINIMA:
            minimum = tl.load(minima_ptr + at + n, mask=in_outputs, other=0.0)
            minimum = minimum.to(tl.float32)[None, :]
        else:
            minimum = tl.zeros((1, BLOCK_N), tl.float32)
        x = tl.load(x_ptrs + group * GROUP, mask=in_rows[:, None], other=0.0)
        if BITS == 8:
            weight = (number.to(tl.float32) * scale + minimum).to(x.dtype)
            total = _multiply(x, weight, total)
        else:
            low = ((number & 15).to(tl.int32) - ZERO).to(tl.float32) * scale + minimum
            total = _multiply(x, low.to(x_ptr.dtype.element_ty), total)
            x = tl.load(x_ptrs + group * GROUP + 16, mask=in_rows[:, None], other=0.0)
            high = ((number >> 4).to(tl.int32) - ZERO).to(tl.float32) * scale + minimum
            total = _multiply(x, high.to(x_ptr.dtype.element_ty), total)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=in_outputs, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * out_stride + n[None, :]
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=in_rows[:, None] & in_outputs[None, :])


def grouped_matmul(x: Tensor, weight: GroupedWeight, bias: Tensor | None, out: Tensor) -> None:
    """Fill out [T, out] (of a float dtype; rows may be apart) with x @ weight.T + bias.

    x  [T, in] bf16, fp16 or fp32"""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows = x.shape[0]
    num_out = weight.shape[0]
    block_m, block_n, num_warps = tile(rows)
    # Few rows: what counts is how many bytes of the weight are under way.
    unroll = max(1, 128 // weight.group_inputs) if block_m == 16 else 1
    _grouped_matmul[(triton.cdiv(num_out, block_n), triton.cdiv(rows, block_m))](
        x, weight.numbers, weight.scales,
        weight.scales if weight.minima is None else weight.minima,
        weight.scales if bias is None else bias, out,
        rows, num_out, weight.numbers.shape[0], x.stride(0), out.stride(0),
        BITS=weight.bits, GROUP=weight.group_inputs, ZERO=weight.zero,
        HAS_MINIMA=weight.minima is not None, HAS_BIAS=bias is not None,
        BLOCK_M=block_m, BLOCK_N=block_n, UNROLL=unroll, num_warps=num_warps,
        num_stages=5 if block_m == 16 else 3,
    )  # fmt: skip
