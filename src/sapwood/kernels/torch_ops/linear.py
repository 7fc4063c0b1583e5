"""Linear layers with the weight in the layout that torch's CPU library wants.

Measured on 2 cores with AVX-512 BF16, 576 -> 960, cold weights: bf16 32 us prepacked against 68 us
for F.linear (1 row), 68 against 108 (32 rows), 1,173 against 1,262 (1,024 rows); fp32 twice as fast
at every size. Both give the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.packed import PackedLinear

_PACK_FOR_ROWS = 32
"""Rows for which oneDNN chooses the layout; that layout was the fastest at 1 and 1,024 rows too."""

_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _Plain:
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def fp32(self, x: Tensor) -> Tensor:
        return self(x).float()  # torch rounds its products to x's dtype

    def unpacked(self) -> Tensor:
        return self.weight

    def refill(self, weight: Tensor) -> bool:
        self.weight.copy_(weight)
        return True


@dataclass(frozen=True, slots=True)
class _Prepacked:
    """A layer whose weight is in oneDNN's blocked layout, which nothing else can read."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x, self.weight, self.bias, "none", [], ""
        )
        return out

    def fp32(self, x: Tensor) -> Tensor:
        return self(x).float()  # oneDNN rounds its products to x's dtype

    def unpacked(self) -> None:
        return None

    def refill(self, weight: Tensor) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class _Widened:
    """Computes in fp32 for a dtype that this CPU multiplies only by emulation."""

    wide: PackedLinear

    def __call__(self, x: Tensor) -> Tensor:
        return self.fp32(x).to(x.dtype)

    def fp32(self, x: Tensor) -> Tensor:
        return self.wide(x.float())

    def unpacked(self) -> Tensor | None:
        return self.wide.unpacked()

    def refill(self, weight: Tensor) -> bool:
        return self.wide.refill(weight.float())


def plain(weight: Tensor, bias: Tensor | None) -> PackedLinear:
    """The layer with its weight as it is."""
    return _Plain(weight, bias)


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix products of that dtype in hardware, through oneDNN."""
    if not _HAS_ONEDNN:
        return dtype == torch.float32
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pack(weight: Tensor, bias: Tensor | None) -> PackedLinear:
    """weight [out, in] -> the fastest layer here.

    fp16 on a CPU without fp16 arithmetic is kept as fp32: twice the memory, and 7 times as fast at
    32 rows as torch's emulation.
    """
    if weight.device.type != "cpu" or not _HAS_ONEDNN:
        return _Plain(weight, bias)
    if weight.dtype == torch.float16 and not cpu_multiplies(torch.float16):
        return _Widened(pack(weight.float(), None if bias is None else bias.float()))
    if weight.dtype not in (torch.float32, torch.bfloat16) or not cpu_multiplies(weight.dtype):
        return _Plain(weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight.default(weight.contiguous(), _PACK_FOR_ROWS)
    return _Prepacked(packed, bias)
