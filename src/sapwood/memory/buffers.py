"""The memory behind the pages: one pair of key and value tensors per layer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sapwood.kernels.interface import kv_cache_shape


def allocate_kv_caches(
    *,
    num_layers: int,
    num_pages: int,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[tuple[Tensor, Tensor]]:
    """Per layer (keys, values), each [num_pages, num_kv_heads, page_size, head_dim], all zero.

    On a CPU the operating system hands the memory out page by page when it is first written, so a
    pool that is mostly unused costs little.
    """
    shape = kv_cache_shape(num_pages, num_kv_heads, page_size, head_dim)

    def zeros() -> Tensor:
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        # numpy's zeros are lazy, torch's are not.
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)

    return [(zeros(), zeros()) for _ in range(num_layers)]
