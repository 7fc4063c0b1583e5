"""A linear layer of each head in one call into C++ (csrc/head_products.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.kernels.cpu import _native
from sapwood.kernels.cpu.linear import Linear
from sapwood.kernels.cpu.tensors import describe, dtype_of
from sapwood.kernels.large_pages import WeightMemory


class HeadProducts:
    """As PackedHeads."""

    def __init__(self, context: _native.Context, memory: WeightMemory, weight: Tensor) -> None:
        """weight [H, out, in]; of bfloat16 `in` is even"""
        self._context = context
        self._shape = weight.shape
        self._dtype = weight.dtype
        self._layers = [Linear(context, memory, head, None, weight.dtype) for head in weight]
        self._native = _native.HeadProducts([layer.native_weight for layer in self._layers])

    @property
    def native(self) -> _native.HeadProducts:
        return self._native

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(heads, outputs, inputs)"""
        heads, num_out, num_in = self._shape
        return heads, num_out, num_in

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def __call__(self, x: Tensor, out: Tensor) -> None:
        heads, num_out, num_in = self._shape
        tokens, kept = x.shape[0], max(0, x.shape[2] - num_in)
        for name, one, width in (("x", x, num_in + kept), ("out", out, num_out + kept)):
            if (
                one.shape != (tokens, heads, width)
                or one.dtype != self._dtype
                or one.stride(2) != 1
                or (self._dtype == torch.bfloat16 and (one.stride(0) % 2 or one.stride(1) % 2))
            ):
                raise ValueError(
                    f"{name} {describe(one)} must be [{tokens}, {heads}, {width}] {self._dtype}, "
                    "with whole heads"
                )
        self._native.run(
            self._context, dtype_of(x), x.data_ptr(), x.stride(0), x.stride(1), out.data_ptr(),
            out.stride(0), out.stride(1), tokens, kept,
        )  # fmt: skip
