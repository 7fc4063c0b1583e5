"""Quantising weights, and products of quantised numbers, as kernels/quantized.py defines them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.kernels.blocks import BLOCK_INPUTS, FORMATS
from sapwood.kernels.coded import CodedWeight, LinearPart
from sapwood.kernels.quantized import (
    FINE_LEVELS,
    FINE_STEP,
    INT8_GROUP_INPUTS,
    PIECE_NUMBERS,
    QuantizedWeight,
)

LEAST_MAGNITUDE = 1e-30
MOST_HALF = 65504.0
CANDIDATE_LEVELS = tuple(13.5 + 0.5 * step for step in range(10))
"""Candidate scales of a block, as the number of steps into which each divides the block's range.

15 steps cover the whole range. With more steps both ends are clipped, which is better if one number
is far from the others.
"""
_PIECE_BLOCKS = PIECE_NUMBERS // BLOCK_INPUTS


def quantize(weight: Tensor, kind: str) -> QuantizedWeight:
    """weight [out, in] of any float dtype -> "int8", "q8_0" or "q4_1".

    Raises ValueError for another kind, or if inputs are not a multiple of 32 where they must be.
    """
    if kind == "int8":
        return quantize_int8(weight)
    if kind not in ("q8_0", "q4_1"):
        raise ValueError(f"weights can be quantised to int8, q8_0 and q4_1, not to {kind}")
    if weight.shape[1] % BLOCK_INPUTS:
        raise ValueError(
            f"the weight has {weight.shape[1]} inputs but blocks take a multiple of {BLOCK_INPUTS}"
        )
    return quantize_q4_1(weight) if kind == "q4_1" else quantize_q8_0(weight)


def quantize_int8(weight: Tensor) -> QuantizedWeight:
    """Each output's largest magnitude becomes 127."""
    numbers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    step = max(1, PIECE_NUMBERS // max(1, weight.shape[1]))
    for first in range(0, weight.shape[0], step):
        rows = slice(first, first + step)
        rounded, scale = round_rows(weight[rows].float())
        numbers[rows] = rounded.to(torch.int8)
        scales[rows] = scale.squeeze(1)
    return QuantizedWeight("int8", (weight.shape[0], weight.shape[1]), numbers, scales)


def round_rows(x: Tensor, levels: int = 127) -> tuple[Tensor, Tensor]:
    """x [..., n] fp32 -> whole numbers from -levels to levels (fp32) and scales [..., 1].

    NaN or an infinity among n makes the scale NaN, and the numbers 0."""
    largest = x.abs().amax(dim=-1, keepdim=True)
    is_zero, is_bad = largest < LEAST_MAGNITUDE, ~largest.isfinite()
    top = torch.full_like(largest, levels)  # levels / tensor would multiply by its reciprocal
    numbers = (x * torch.div(top, largest)).round().masked_fill(is_zero | is_bad, 0.0)
    scale = torch.div(largest, top).masked_fill(is_zero, 0.0)
    return numbers, scale.masked_fill(is_bad, torch.nan)


def _half(x: Tensor) -> Tensor:
    """x rounded to fp16; finite numbers beyond its range become its largest number."""
    return torch.where(x.isfinite(), x.clamp(-MOST_HALF, MOST_HALF), x).half()


def quantize_q8_0(weight: Tensor) -> QuantizedWeight:
    """Each block's largest magnitude becomes 127; numbers are rounded for the scale as fp16."""
    blocks = weight.reshape(-1, BLOCK_INPUTS)
    out = torch.empty(
        blocks.shape[0], FORMATS["q8_0"].num_bytes, dtype=torch.uint8, device=weight.device
    )
    for first in range(0, blocks.shape[0], _PIECE_BLOCKS):
        x = blocks[first : first + _PIECE_BLOCKS].float()
        largest = x.abs().amax(1, keepdim=True)
        scale = _half(torch.div(largest, torch.full_like(largest, 127.0)))
        wide = scale.float()
        inverse = torch.where(wide > 0, 1 / wide, 0)
        numbers = (x * inverse).round().nan_to_num_(0.0).clamp_(-127, 127).to(torch.int8)
        piece = out[first : first + _PIECE_BLOCKS]
        piece[:, :2] = scale.view(torch.uint8)
        piece[:, 2:] = numbers.view(torch.uint8)
    return _of_blocks("q8_0", weight, out)


def quantize_q4_1(weight: Tensor) -> QuantizedWeight:
    """Blocks whose scale and minimum make the squared error small.

    For each candidate range, the numbers are rounded, and scale and minimum fitted to them by least
    squares; the best candidate's are kept as fp16, and the numbers rounded again for those.
    """
    blocks = weight.reshape(-1, BLOCK_INPUTS)
    out = torch.empty(
        blocks.shape[0], FORMATS["q4_1"].num_bytes, dtype=torch.uint8, device=weight.device
    )
    for first in range(0, blocks.shape[0], _PIECE_BLOCKS):
        x = blocks[first : first + _PIECE_BLOCKS].float()
        scale, minimum = (_half(part) for part in _fit(x))
        wide = scale.float()
        inverse = torch.where(wide > 0, 1 / wide, 0)
        levels = ((x - minimum.float()) * inverse).round().nan_to_num_(0.0)
        numbers = levels.clamp_(0, 15).to(torch.uint8)
        piece = out[first : first + _PIECE_BLOCKS]
        piece[:, :2] = scale.view(torch.uint8)
        piece[:, 2:4] = minimum.view(torch.uint8)
        piece[:, 4:] = numbers[:, :16] | numbers[:, 16:] << 4
    return _of_blocks("q4_1", weight, out)


def _of_blocks(kind: str, weight: Tensor, blocks: Tensor) -> QuantizedWeight:
    """blocks [all blocks of `weight`, bytes]."""
    num_out, num_in = weight.shape
    row_bytes = num_in // BLOCK_INPUTS * FORMATS[kind].num_bytes
    return QuantizedWeight(kind, (num_out, num_in), blocks.view(num_out, row_bytes))


def _fit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [blocks, 32] fp32 -> scale and minimum, each [blocks, 1]."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    middle, extent = (low + high) * 0.5, high - low
    sum_x = x.sum(1, keepdim=True)
    best = torch.full_like(low, -torch.inf)
    scale, minimum = torch.zeros_like(low), low.clone()
    for levels in CANDIDATE_LEVELS:
        inverse = torch.where(extent > 0, levels / extent, 0)
        numbers = ((x - middle) * inverse + 7.5).round().clamp_(0, 15)
        sum_q = numbers.sum(1, keepdim=True)
        sum_qq = numbers.square().sum(1, keepdim=True)
        sum_qx = (numbers * x).sum(1, keepdim=True)
        spread = BLOCK_INPUTS * sum_qq - sum_q.square()
        fitted = torch.where(spread > 0, (BLOCK_INPUTS * sum_qx - sum_q * sum_x) / spread, 0)
        offset = (sum_x - fitted * sum_q) / BLOCK_INPUTS
        # The squared error is the sum of squares of x minus this amount.
        gain = fitted * sum_qx + offset * sum_x
        better = (gain > best) & (spread > 0)
        best = torch.where(better, gain, best)
        scale = torch.where(better, fitted, scale)
        minimum = torch.where(better, offset, minimum)
    # NaN or infinity among the weights must show.
    return scale, torch.where(sum_x.isfinite(), minimum, torch.nan)


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """The parts' outputs one after another."""

    parts: tuple[LinearPart, ...]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return self.fp32(x).to(x.dtype)

    def fp32(self, x: Tensor) -> Tensor:
        out = torch.cat([multiply(x, part) for part in self.parts], dim=1)
        return out if self.bias is None else out + self.bias.float()

    def unpacked(self) -> None:
        return None

    def refill(self, weight: Tensor) -> bool:
        return False


def multiply(x: Tensor, weight: LinearPart) -> Tensor:
    """x [T, in] -> [T, out] fp32."""
    wide = x.float()
    if isinstance(weight, CodedWeight):
        return wide @ weight.dequantized(torch.float32).T
    if weight.scales is not None:
        total = torch.zeros(x.shape[0], weight.shape[0], device=x.device)
        for first in range(0, x.shape[1], INT8_GROUP_INPUTS):
            group = slice(first, first + INT8_GROUP_INPUTS)
            numbers, scale = round_rows(wide[:, group])
            # Exact: whole numbers below 2**24.
            total += (numbers @ weight.data[:, group].float().T) * scale
        return total * weight.scales
    of_groups = wide.reshape(x.shape[0], x.shape[1] // BLOCK_INPUTS, BLOCK_INPUTS)
    if weight.x_bits == 8:
        return _multiply_blocks(*round_rows(of_groups), weight)
    numbers, scale = round_rows(of_groups, FINE_LEVELS)
    high = (numbers / FINE_STEP).round()
    # Each digit for itself: only then are the sums of a group exact in fp32.
    lower = _multiply_blocks(numbers - high * FINE_STEP, scale, weight)
    return _multiply_blocks(high, scale * FINE_STEP, weight) + lower


def _multiply_blocks(numbers: Tensor, scale: Tensor, weight: QuantizedWeight) -> Tensor:
    """Whole numbers [T, in / 32, 32] of a digit and its scales [T, in / 32, 1] -> [T, out] fp32."""
    weights, weight_scales, minima = weight.unpacked()
    _, groups, size = weights.shape
    scales = scale.squeeze(2).repeat_interleave(BLOCK_INPUTS // size, dim=1)
    out = []
    for row, row_scale in zip(numbers.reshape(-1, groups, size), scales, strict=True):
        sums = torch.einsum("gi,ngi->ng", row, weights)
        of_minima = minima * (row.sum(1) * row_scale)
        out.append((sums * weight_scales * row_scale + of_minima).sum(1))
    return torch.stack(out) if out else numbers.new_empty(0, weight.shape[0])
