"""The memory behind the pages: one pair of key and value tensors per layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sapwood.kernels.interface import kv_cache_shape
from sapwood.kernels.large_pages import large_pages


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
    """Per layer (keys, values), each of the shape that `kv_cache_shape` gives, all zero.

    One page holds its tokens for all layers in one piece: a page that is used for the first time
    touches one stretch of memory instead of two in every layer, and a transfer copies one. On a CPU
    the operating system hands the memory out when it is first written, so a pool that is mostly
    unused costs little.
    """
    page = kv_cache_shape(1, num_kv_heads, page_size, head_dim, dtype)[1:]
    shape = (num_pages, num_layers, 2, *page)
    if device.type == "cpu":
        num_bytes = math.prod(shape) * dtype.itemsize
        pool = large_pages(num_bytes)[:num_bytes].view(dtype).view(shape)
    else:
        pool = torch.zeros(shape, dtype=dtype, device=device)
    return [(pool[:, layer, 0], pool[:, layer, 1]) for layer in range(num_layers)]
