"""How the kernels are told of an 8-bit KV cache; kernels/kv_cache.py says what it holds."""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.kernels.kv_cache import is_8_bit, numbers_and_scales

KV_NAMES = {
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8_e4m3",
    torch.float8_e5m2: "fp8_e5m2",
}


def parted(cache: Tensor, head_dim: int) -> tuple[Tensor, Tensor | None]:
    """The entries [num_pages, Hk, page_size, D], those of an 8-bit cache as uint8, and the scales
    [num_pages, Hk, page_size] bf16 of an 8-bit one; page and head are as far apart in both, in
    bytes."""
    return numbers_and_scales(cache, head_dim) if is_8_bit(cache.dtype) else (cache, None)
