"""Linear layers: dense ones through cuBLAS, or through dense_matmul.py where tiles are fixed;
quantised ones through the products in this package.

Quantised weights stay quantised in memory. int8 weights are multiplied as in kernels/quantized.py,
with x rounded to int8 per 64 inputs. FP8 weights that were made for FP8 activations are multiplied
with x rounded to FP8, by GPUs that have such products (compute capability 8.9). All other coded
weights, and GGUF's blocks, are decoded on their way to the matrix units, and x is not rounded. For
GGUF's blocks that is more exact than a product with rounded x, and no slower as long as reading the
weight takes most of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.coded import CodedWeight, LinearPart, neighbours_stacked
from sapwood.kernels.packed import PackedLinear
from sapwood.kernels.quantized import (
    INT8_GROUP_INPUTS,
    QuantizedWeight,
)
from sapwood.kernels.triton.activations import round_activations
from sapwood.kernels.triton.dense_matmul import dense_matmul
from sapwood.kernels.triton.grouped_matmul import GroupedWeight, grouped_matmul
from sapwood.kernels.triton.packing import packed_blocks, packed_codes
from sapwood.kernels.triton.scaled_matmul import LEAST_GROUP, scaled_matmul
from sapwood.kernels.triton.tiles import TileChoice


@dataclass(frozen=True, slots=True, eq=False)
class DenseLinear:
    """weight [out, in], bias [out] or None, both of the dtype of x."""

    weight: Tensor
    bias: Tensor | None
    tiles: TileChoice

    def __call__(self, x: Tensor) -> Tensor:
        if self.tiles.fixed:
            return self._fixed(x, x.dtype)
        return F.linear(x, self.weight, self.bias)

    def fp32(self, x: Tensor) -> Tensor:
        if self.tiles.fixed:
            return self._fixed(x, torch.float32)
        if x.device.type != "cuda" or x.dtype == torch.float32:
            return self(x).float()
        out: Tensor = torch.mm(x, self.weight.T, out_dtype=torch.float32)
        return out if self.bias is None else out.add_(self.bias)

    def _fixed(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        out = torch.empty((x.shape[0], self.weight.shape[0]), dtype=dtype, device=x.device)
        dense_matmul(x, self.weight, self.bias, out, self.tiles.of(x.shape[0]))
        return out

    def unpacked(self) -> Tensor:
        return self.weight

    def refill(self, weight: Tensor) -> bool:
        self.weight.copy_(weight)
        return True


class _Multiply(Protocol):
    num_out: int

    def __call__(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Fill out [T, num_out]."""
        ...

    @property
    def grouped(self) -> GroupedWeight | None:
        """As QuantizedLinear.grouped."""
        ...


class QuantizedLinear:
    """Quantised weights whose outputs come one after another.

    parts   each fills its own columns of the result
    bias    [all outputs] or None
    num_in  inputs of every part
    """

    def __init__(self, parts: Sequence[_Multiply], bias: Tensor | None, num_in: int) -> None:
        self._parts = tuple(parts)
        self.bias = bias
        self._num_in = num_in
        self._num_out = sum(part.num_out for part in parts)

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x, x.dtype)

    def fp32(self, x: Tensor) -> Tensor:
        return self._multiply(x, torch.float32)

    def unpacked(self) -> None:
        return None

    def refill(self, weight: Tensor) -> bool:
        return False

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
            part(x, None if self.bias is None else self.bias[columns], out[:, columns])
            first += part.num_out
        return out

    @property
    def grouped(self) -> GroupedWeight | None:
        """The whole weight for a kernel that decodes it, in the same memory; None: there is no
        such form."""
        return self._parts[0].grouped if len(self._parts) == 1 else None


class _Int8:
    """An int8 weight: numbers [out, inputs filled up to whole groups] int8, scales [out] fp32."""

    def __init__(self, weight: QuantizedWeight, tiles: TileChoice) -> None:
        self._tiles = tiles
        assert weight.scales is not None, "int8 weights have scales"
        self.num_out, self._num_in = weight.shape
        filling = -self._num_in % INT8_GROUP_INPUTS
        self._numbers = F.pad(weight.data, (0, filling)).contiguous()
        self._scales = weight.scales.unsqueeze(1).contiguous()

    def __call__(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        rounded = round_activations(x, INT8_GROUP_INPUTS, torch.int8)
        scaled_matmul(rounded, self._numbers, self._scales, bias, out, self._tiles)

    @property
    def grouped(self) -> GroupedWeight:
        return GroupedWeight(
            values="int8",
            shape=(self.num_out, self._num_in),
            numbers=_in_blocks(self._numbers, INT8_GROUP_INPUTS),
            out_scales=self._scales[:, 0],
        )


class _Grouped:
    """A weight that `grouped_matmul` decodes.

    order  [in] int32: the order of inputs as in CodedWeight, or None
    """

    def __init__(
        self, weight: GroupedWeight, tiles: TileChoice, order: Tensor | None = None
    ) -> None:
        self._tiles = tiles
        self.num_out = weight.shape[0]
        self._weight = weight
        self._order = order

    def __call__(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        if self._order is not None:
            x = x.index_select(1, self._order)
        grouped_matmul(x, self._weight, bias, out, self._tiles)

    @property
    def grouped(self) -> GroupedWeight | None:
        return self._weight if self._order is None else None


class _Fp8:
    """Products of E4M3 with x rounded to it: one scale per token, or per token and group."""

    def __init__(self, weight: CodedWeight, tiles: TileChoice) -> None:
        self._tiles = tiles
        self.num_out, num_in = weight.shape
        self._weight = weight.data.view(torch.float8_e4m3fn).contiguous()
        self._group = min(weight.group_inputs, num_in)
        self._scales = weight.scales.contiguous()

    def __call__(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        rounded = round_activations(x, self._group, torch.float8_e4m3fn)
        scaled_matmul(rounded, self._weight, self._scales, bias, out, self._tiles)

    @property
    def grouped(self) -> GroupedWeight | None:
        num_in = self._weight.shape[1]
        if num_in % LEAST_GROUP:
            return None
        has_groups = self._scales.shape[1] > 1
        return GroupedWeight(
            values="e4m3",
            shape=(self.num_out, num_in),
            numbers=_in_blocks(self._weight, LEAST_GROUP),
            group_inputs=self._group if has_groups else 0,
            scales=self._scales.T.contiguous() if has_groups else None,
            out_scales=None if has_groups else self._scales[:, 0],
        )

    @staticmethod
    def takes(weight: CodedWeight) -> bool:
        num_in, group = weight.shape[1], weight.group_inputs
        is_plain = weight.shifts is None and weight.out_scales is None and weight.order is None
        fits = group >= num_in or (group % LEAST_GROUP == 0 and num_in % group == 0)
        return weight.codes == "e4m3" and weight.rounds_inputs and is_plain and fits


def _in_blocks(numbers: Tensor, block: int) -> Tensor:
    """Numbers of 8 bits [out, in] as [blocks, out, bytes], in the same memory."""
    return numbers.view(torch.uint8).view(numbers.shape[0], -1, block).transpose(0, 1)


def quantized_linear(
    parts: Sequence[LinearPart], bias: Tensor | None, tiles: TileChoice
) -> PackedLinear:
    """As Kernels.pack_quantized_linear.

    Raises ValueError if the parts or the bias do not fit each other."""
    inputs = sorted({part.shape[1] for part in parts})
    if len(inputs) != 1:
        raise ValueError(f"the parts of a layer have different inputs: {inputs}")
    num_out = sum(part.shape[0] for part in parts)
    if bias is not None and bias.shape != (num_out,):
        raise ValueError(f"the bias {list(bias.shape)} must be [{num_out}]")
    packed = [_packed(part, tiles) for part in neighbours_stacked(parts) if part.shape[0]]
    return QuantizedLinear(packed, bias, inputs[0])


def _packed(weight: LinearPart, tiles: TileChoice) -> _Multiply:
    if isinstance(weight, CodedWeight):
        if _Fp8.takes(weight) and _multiplies_fp8(weight.data.device):
            return _Fp8(weight, tiles)
        return _Grouped(packed_codes(weight), tiles, weight.order)
    if weight.kind == "int8":
        return _Int8(weight, tiles)
    return _Grouped(packed_blocks(weight), tiles)


def _multiplies_fp8(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
