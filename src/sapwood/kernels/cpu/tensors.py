"""What the compiled module takes of tensors: checks of their shapes, dtypes and layouts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.kv_cache import kv_cache_shape

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""The compiled module's numbers for the dtypes of activations."""

ACTIVATIONS = {activation: number for number, activation in enumerate(Activation)}
"""Its numbers for activations."""

KV_FORMATS = {torch.int8: 1, torch.float8_e4m3fn: 2, torch.float8_e5m2: 3}
"""Its numbers for caches in 8 bits; 0 is for the activations' dtype."""


def is_held(stored: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether numbers that are stored so can be used with activations of `dtype` as they are."""
    is_narrow = dtype == torch.float32 and stored in (torch.bfloat16, torch.float16)
    return stored == dtype or is_narrow


def check_embedding(weight: Tensor, dtype: torch.dtype) -> None:
    """ValueError unless rows of `weight` can become vectors of `dtype`."""
    if not weight.is_contiguous() or not weight.is_cpu:
        raise ValueError(f"embedding {describe(weight)} must be contiguous and on a CPU")
    if dtype not in DTYPES or not is_held(weight.dtype, dtype):
        raise ValueError(f"embedding {describe(weight)} cannot be read as {dtype}")


def describe(x: Tensor) -> str:
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def dtype_of(x: Tensor) -> int:
    """The compiled module's number for x's dtype; TypeError if x is not for these kernels."""
    code = DTYPES.get(x.dtype)
    if code is None or not x.is_cpu:
        raise TypeError(f"{describe(x)} on {x.device} is not float32 or bfloat16 on a CPU")
    return code


def rows_of(x: Tensor, weight: Tensor) -> tuple[int, int]:
    """x's rows and columns, once weight is known to have one entry per column."""
    rows, hidden = x.shape
    if weight.dtype != x.dtype or weight.numel() != hidden or not weight.is_contiguous():
        raise ValueError(f"weight {describe(weight)} does not fit x {describe(x)}")
    return rows, hidden


def address_of(weight: Tensor | None, like: Tensor, size: int, name: str) -> int:
    """The address of an optional weight of `size` entries; 0 if there is none."""
    if weight is None:
        return 0
    if weight.dtype != like.dtype or weight.numel() != size or not weight.is_contiguous():
        raise ValueError(f"{name} {describe(weight)} must be [{size}] of {like.dtype}")
    return weight.data_ptr()


def check_indices(index: Tensor, name: str, size: int) -> None:
    if index.dtype != torch.int64 or index.numel() != size or not index.is_contiguous():
        raise ValueError(f"{name} {describe(index)} must be [{size}] int64 and contiguous")


class CacheLayout(NamedTuple):
    """How one layer's keys and values lie; strides count elements between pages.

    kv  the compiled module's number for how entries are stored
    """

    num_pages: int
    page_size: int
    key_stride: int
    value_stride: int
    kv: int


def cache_layout(
    keys: Tensor, values: Tensor, like: Tensor, num_kv_heads: int, head_dim: int
) -> CacheLayout:
    """Of caches that fit activations `like`, dense or in 8 bits; ValueError if they do not.

    Pages may lie apart (keys and values of a page side by side); inside, a page is contiguous.
    """
    num_pages, _, page_size, _ = keys.shape
    kv = 0 if keys.dtype == like.dtype else KV_FORMATS.get(keys.dtype, -1)
    shape = kv_cache_shape(num_pages, num_kv_heads, page_size, head_dim, keys.dtype)
    width = shape[-1]
    for cache in (keys, values):
        strides = cache.stride()
        if (
            kv < 0
            or cache.shape[1] != num_kv_heads
            or cache.shape[3] != width
            or cache.dtype not in (keys.dtype, like.dtype)
            or strides[1:] != (page_size * width, width, 1)
        ):
            raise ValueError(
                f"KV cache {describe(cache)} with strides {list(strides)} must be "
                f"[pages, {num_kv_heads}, page_size, {width}] {like.dtype} or in 8 bits, "
                "each page contiguous"
            )
    if values.shape != keys.shape or values.dtype != keys.dtype:
        raise ValueError(f"key_cache {describe(keys)} and value_cache {describe(values)} differ")
    return CacheLayout(num_pages, page_size, keys.stride(0), values.stride(0), kv)


def table_of(batch: AttentionBatch) -> tuple[int, int, int]:
    """(address, entries between rows, entries per row) of the page table."""
    table = batch.page_table
    if (
        table.dtype != torch.int32
        or table.dim() != 2
        or (table.shape[1] > 1 and table.stride(1) != 1)
    ):
        raise ValueError(f"page_table {describe(table)} must be [R, max_pages] int32 rows")
    if table.shape[0] < len(batch.query_lens):
        raise ValueError(
            f"page_table has {table.shape[0]} rows for {len(batch.query_lens)} requests"
        )
    return table.data_ptr(), table.stride(0), table.shape[1]


def per_head(numbers: Tensor | None, num_heads: int, name: str) -> int:
    """The address of numbers [num_heads]; 0 if there are none. ValueError if they do not fit."""
    if numbers is None:
        return 0
    if (
        numbers.shape != (num_heads,)
        or numbers.dtype != torch.float32
        or not numbers.is_contiguous()
        or not numbers.is_cpu
    ):
        raise ValueError(f"{name} {describe(numbers)} must be [{num_heads}] float32, contiguous")
    return numbers.data_ptr()


class StateLayout(NamedTuple):
    """How the states of short convolutions lie; state_stride counts elements between slots."""

    num_slots: int
    state_stride: int
    channels: int
    length: int


def state_layout(states: Tensor, weight: Tensor, bias: Tensor | None, like: Tensor) -> StateLayout:
    """Of states [num_slots, C, L - 1] that fit a convolution's weight [C, L] and activations
    `like`; ValueError if they do not. Slots may lie apart."""
    channels, length = weight.shape
    num_slots = states.shape[0]
    if weight.dtype != like.dtype or not weight.is_contiguous():
        raise ValueError(f"weight {describe(weight)} must be contiguous {like.dtype}")
    address_of(bias, like, channels, "bias")
    if (
        states.dtype != like.dtype
        or states.shape[1:] != (channels, length - 1)
        or states.stride()[1:] != (length - 1, 1)
    ):
        raise ValueError(
            f"states {describe(states)} with strides {list(states.stride())} must be [slots, "
            f"{channels}, {length - 1}] {like.dtype}, each slot contiguous"
        )
    return StateLayout(num_slots, states.stride(0), channels, length)


def lengths_of(batch: AttentionBatch) -> tuple[int, int, int]:
    """(address of query_start, of context_len, number of requests)"""
    num_requests = len(batch.query_lens)
    for name, tensor, size in (
        ("query_start", batch.query_start, num_requests + 1),
        ("context_len", batch.context_len, num_requests),
    ):
        if tensor.dtype != torch.int32 or tensor.numel() != size or not tensor.is_contiguous():
            raise ValueError(f"{name} {describe(tensor)} must be [{size}] int32 and contiguous")
    return batch.query_start.data_ptr(), batch.context_len.data_ptr(), num_requests
