"""Linear layers: dense ones through cuBLAS, quantised ones through the products in this package.

int8 weights (kernels/quantized.py) are multiplied as said there, with x rounded to int8 per 64
inputs. Weights of codes and GGUF's blocks are decoded on the way to the matrix units and x stays as
it is: for the blocks more exact than products of rounded x, and no slower where reading the weight
is what takes the time. All of them stay quantised in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.coded import CodedWeight, LinearPart, neighbours_stacked
from sapwood.kernels.interface import PackedLinear
from sapwood.kernels.quantized import (
    INT8_GROUP_INPUTS,
    QuantizedWeight,
)
from sapwood.kernels.triton.activations import round_activations
from sapwood.kernels.triton.grouped_matmul import GroupedWeight, grouped_matmul
from sapwood.kernels.triton.packing import packed_blocks, packed_codes
from sapwood.kernels.triton.scaled_matmul import scaled_matmul

FP8_BLOCK = 128
"""Outputs and inputs that share a scale in FP8 weights with block scales."""


@dataclass(frozen=True, slots=True, eq=False)
class DenseLinear:
    """weight [out, in], bias [out] or None, both of the dtype of x."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def fp32(self, x: Tensor) -> Tensor:
        if x.device.type != "cuda" or x.dtype == torch.float32:
            return self(x).float()
        out: Tensor = torch.mm(x, self.weight.T, out_dtype=torch.float32)
        return out if self.bias is None else out.add_(self.bias)


class _Multiply(Protocol):
    num_out: int

    def __call__(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Fill out [T, num_out]."""
        ...


class QuantizedLinear:
    """Quantised weights whose outputs come one after another.

    parts   each fills its own columns of the result
    bias    [all outputs] or None
    num_in  inputs of every part
    """

    def __init__(self, parts: Sequence[_Multiply], bias: Tensor | None, num_in: int) -> None:
        self._parts = tuple(parts)
        self._bias = bias
        self._num_in = num_in
        self._num_out = sum(part.num_out for part in parts)

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x, x.dtype)

    def fp32(self, x: Tensor) -> Tensor:
        return self._multiply(x, torch.float32)

    def _multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        rows, num_in = x.shape
        if num_in != self._num_in:
            raise ValueError(
                f"x {list(x.shape)} does not fit a quantised weight "
                f"[{self._num_out}, {self._num_in}]"
            )
        out = torch.empty((rows, self._num_out), dtype=dtype, device=x.device)
        first = 0
        for part in self._parts:
            columns = slice(first, first + part.num_out)
            part(x, None if self._bias is None else self._bias[columns], out[:, columns])
            first += part.num_out
        return out


class _Int8:
    """numbers [out, inputs filled up to whole groups] int8, scales [out] fp32"""

    def __init__(self, weight: QuantizedWeight) -> None:
        assert weight.scales is not None, "int8 weights have scales"
        self.num_out, num_in = weight.shape
        filling = -num_in % INT8_GROUP_INPUTS
        self._numbers = F.pad(weight.data, (0, filling)).contiguous()
        self._scales = weight.scales.contiguous()

    def __call__(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        rounded = round_activations(x, INT8_GROUP_INPUTS, torch.int8)
        scaled_matmul(rounded, self._numbers, self._scales, bias, out)


class _Grouped:
    """order  [in] int32: as CodedWeight has it, or None"""

    def __init__(self, weight: GroupedWeight, order: Tensor | None = None) -> None:
        self.num_out = weight.shape[0]
        self._weight = weight
        self._order = order

    def __call__(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        if self._order is not None:
            x = x.index_select(1, self._order)
        grouped_matmul(x, self._weight, bias, out)


class _Fp8:
    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        self.num_out = weight.shape[0]
        self._weight = weight.contiguous()
        self._scales = scales.float().contiguous()
        self._has_blocks = scales.dim() == 2

    def __call__(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        group, rows = (FP8_BLOCK, FP8_BLOCK) if self._has_blocks else (x.shape[1], 0)
        rounded = round_activations(x, group, torch.float8_e4m3fn)
        scaled_matmul(rounded, self._weight, self._scales, bias, out, weight_rows=rows)


def quantized_linear(parts: Sequence[LinearPart], bias: Tensor | None) -> PackedLinear:
    """As Kernels.pack_quantized_linear.

    Raises ValueError if the parts or the bias do not fit each other."""
    inputs = sorted({part.shape[1] for part in parts})
    if len(inputs) != 1:
        raise ValueError(f"the parts of a layer have different inputs: {inputs}")
    num_out = sum(part.shape[0] for part in parts)
    if bias is not None and bias.shape != (num_out,):
        raise ValueError(f"the bias {list(bias.shape)} must be [{num_out}]")
    packed = [_packed(part) for part in neighbours_stacked(parts) if part.shape[0]]
    return QuantizedLinear(packed, bias, inputs[0])


def fp8_linear(weight: Tensor, scales: Tensor, bias: Tensor | None) -> PackedLinear:
    """A layer whose weight [out, in] is float8_e4m3fn; x is rounded to FP8 when it is called.

    scales  [out] fp32, one per output: then x gets one scale per token; or
            [ceil(out / 128), in / 128] fp32, one per block of 128 x 128: then x gets one per token
            and 128 inputs, of which `in` must be a multiple
    Source  Micikevicius et al. 2022, arXiv:2209.05433; blocks: DeepSeek-AI 2024, arXiv:2412.19437
    Raises  ValueError if the scales do not fit the weight
    """
    num_out, num_in = weight.shape
    blocks = (-(-num_out // FP8_BLOCK), -(-num_in // FP8_BLOCK))
    has_blocks = tuple(scales.shape) == blocks and num_in % FP8_BLOCK == 0
    if weight.dtype != torch.float8_e4m3fn or (
        tuple(scales.shape) != (num_out,) and not has_blocks
    ):
        raise ValueError(
            f"{weight.dtype} {list(weight.shape)} with scales {list(scales.shape)} is no FP8 "
            f"weight: it takes float8_e4m3fn, and scales [{num_out}] or, if the inputs are a "
            f"multiple of {FP8_BLOCK}, {list(blocks)}"
        )
    return QuantizedLinear([_Fp8(weight, scales)], bias, num_in)


def _packed(weight: LinearPart) -> _Multiply:
    if isinstance(weight, CodedWeight):
        return _Grouped(packed_codes(weight), weight.order)
    return _Int8(weight) if weight.kind == "int8" else _Grouped(packed_blocks(weight))
