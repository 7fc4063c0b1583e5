"""Dense linear layers, packed for the compiled module (csrc/pack.h)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.cpu import _native
from sapwood.kernels.cpu.quantized import WEIGHT_KINDS
from sapwood.kernels.cpu.tensors import DTYPES, describe
from sapwood.kernels.large_pages import WeightMemory


class Linear:
    """One linear layer, its weight packed in panels (csrc/pack.h).

    A weight of 16 bits stays so for float32 activations, and is widened where it is multiplied.
    """

    def __init__(
        self,
        context: _native.Context,
        memory: WeightMemory,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """dtype: of the activations"""
        self._context = context
        self._num_out, self._num_in = weight.shape
        self._dtype = dtype
        self._code = DTYPES[dtype]
        self._kind = WEIGHT_KINDS[weight.dtype]
        # bf16 is multiplied in pairs; an odd row gets a zero at its end.
        self._padding = self._num_in % 2 if weight.dtype == torch.bfloat16 else 0
        if self._padding:
            weight = F.pad(weight, (0, 1))
        padded_out = -(-self._num_out // _native.PANEL) * _native.PANEL
        self._weight = memory.empty((padded_out, weight.shape[1]), weight.dtype)
        self._pack(weight)
        self._bias = None if bias is None else bias.contiguous()
        self._weight_address = self._weight.data_ptr()
        self._bias_address = 0 if self._bias is None else self._bias.data_ptr()

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def sizes(self) -> tuple[int, int]:
        """(outputs, inputs)"""
        return self._num_out, self._num_in

    @property
    def native_weight(self) -> _native.LinearWeight:
        """What C++ computes this layer with; valid as long as this layer lives."""
        return _native.LinearWeight(
            self._kind, self._weight_address, 0, self._bias_address,
            self._num_out, self._num_in + self._padding, self._num_out, None,
        )  # fmt: skip

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x, x.dtype)

    def fp32(self, x: Tensor) -> Tensor:
        return self._multiply(x, torch.float32)

    def _pack(self, weight: Tensor) -> None:
        weight = weight.contiguous()
        _native.pack_weight(
            self._kind, weight.data_ptr(), self._weight.data_ptr(), self._num_out, weight.shape[1]
        )

    def refill(self, weight: Tensor) -> bool:
        self._pack(F.pad(weight, (0, 1)) if self._padding else weight)
        return True

    def unpacked(self) -> Tensor:
        panels, num_in = self._weight, self._num_in + self._padding
        if panels.dtype == torch.bfloat16:
            pairs = panels.view(-1, num_in // 2, _native.PANEL, 2)
            rows = pairs.permute(0, 2, 1, 3).reshape(-1, num_in)
        else:
            rows = panels.view(-1, num_in, _native.PANEL).transpose(1, 2).reshape(-1, num_in)
        return rows[: self._num_out, : self._num_in]

    def _multiply(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        rows, num_in = x.shape
        if num_in != self._num_in or x.dtype != self._dtype:
            raise ValueError(
                f"x {describe(x)} does not fit a weight [{self._num_out}, {self._num_in}] "
                f"for {self._dtype}"
            )
        if self._padding:
            x = F.pad(x, (0, 1))
            num_in += 1
        x_stride, entry_stride = x.stride()
        if entry_stride != 1 or (x_stride % 2 != 0 and self._dtype == torch.bfloat16):
            x, x_stride = x.contiguous(), num_in
        out = torch.empty((rows, self._num_out), dtype=out_dtype)
        _native.linear(
            self._context, self._code, x.data_ptr(), x_stride, self._kind, self._weight_address,
            self._bias_address, out.data_ptr(), rows, self._num_out, num_in,
            out_dtype == torch.float32,
        )  # fmt: skip
        return out
