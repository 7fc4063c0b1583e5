"""How an 8-bit KV cache is passed to the kernels; its layout is defined in kernels/kv_cache.py."""

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
    """(entries, scales) of a cache.

    entries  [num_pages, Hk, page_size, D]; uint8 for an 8-bit cache
    scales   [num_pages, Hk, page_size] bf16 for an 8-bit cache, else None; pages and heads have the
             same strides as in `entries`, in bytes
    """
    return numbers_and_scales(cache, head_dim) if is_8_bit(cache.dtype) else (cache, None)
