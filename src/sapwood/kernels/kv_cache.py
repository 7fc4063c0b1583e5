"""The KV cache in 8 bits: how a tile holds numbers and scales, in torch.

A cache of dtype int8, float8_e4m3fn or float8_e5m2 is a tensor [pages, Hk, page_size, D + 2]. Its
last two dimensions are one contiguous tile of bytes: page_size * D numbers, token by token, then
page_size scales in bf16. An entry is number * scale.

The scale of a token and head is the largest entry's size over the format's largest number, rounded
up to bf16, so that nothing saturates and nothing has to be calibrated. Steps between fp8 numbers
double at every power of two, so a scale up to twice as large may fit the entries better. So several
numbers are tried for the largest entry (`top_numbers`), and the one with the smallest squared error
is taken. An entry that is infinite or NaN makes the scale so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.base.dtypes import DTYPE_BYTES, KV_CACHE_8_BIT, KV_SCALE_BYTES

LARGEST_NUMBER = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
"""Cache dtype -> its largest number. These are the 8-bit dtypes."""

_SMALLEST_TOP = 1e-30
"""A vector whose entries are all smaller is zero."""


def is_8_bit(dtype: torch.dtype) -> bool:
    return dtype in LARGEST_NUMBER


def numbers_and_scales(cache: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Views of a cache [pages, Hk, page_size, D + 2]: (numbers [pages, Hk, page_size, D] uint8,
    scales [pages, Hk, page_size] bf16)."""
    pages, heads, page_size, _ = cache.shape
    page_bytes, tile_bytes = cache.stride()[:2]
    at = cache.storage_offset()
    numbers = cache.view(torch.uint8).as_strided(
        (pages, heads, page_size, head_dim), (page_bytes, tile_bytes, head_dim, 1), at
    )
    scales = cache.view(torch.bfloat16).as_strided(
        (pages, heads, page_size),
        (page_bytes // KV_SCALE_BYTES, tile_bytes // KV_SCALE_BYTES, 1),
        (at + page_size * head_dim) // KV_SCALE_BYTES,
    )
    return numbers, scales


def top_numbers(dtype: torch.dtype) -> list[float]:
    """The numbers that are tried for the largest entry of a vector.

    These are the format's largest number, and for fp8 also smaller ones down to its half, in steps
    of 2**(1/8), rounded to fp32."""
    largest = LARGEST_NUMBER[dtype]
    return [largest * 2 ** (-step / 8) for step in range(1 if dtype == torch.int8 else 8)]


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., D] -> (numbers [..., D] of 8-bit `dtype`, scales [...] bf16)."""
    wide = x.float()
    top = wide.abs().amax(dim=-1)
    first, *others = top_numbers(dtype)
    scales = _scales(top, first)
    least = _squared_error(wide, scales, scales, dtype)
    best = scales
    for number in others:
        candidate = _scales(top, number)
        error = _squared_error(wide, candidate, scales, dtype)
        is_better = error < least
        best = torch.where(is_better, candidate, best)
        least = torch.where(is_better, error, least)
    return _numbers(wide, best, dtype), best


def _scales(top: Tensor, number: float) -> Tensor:
    """The bf16 scales with which an entry of size `top` becomes at most `number`."""
    bits = (top / torch.tensor(number)).view(torch.int32)
    rounded_up = ((bits + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(top < _SMALLEST_TOP, torch.zeros_like(rounded_up), rounded_up)


def _scaled(wide: Tensor, scales: Tensor) -> Tensor:
    inverse = torch.where(scales > 0, scales.float().reciprocal(), 0.0)
    return wide * inverse.unsqueeze(-1)


def _numbers(wide: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    scaled = _scaled(wide, scales)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype)


def _squared_error(wide: Tensor, scales: Tensor, unit: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over the last dimension, in units of `unit` squared: other squares might overflow."""
    scaled = _scaled(wide, scales)
    error = _numbers(wide, scales, dtype).float() - scaled
    factor = scales.float() / unit.float()
    return error.square().sum(dim=-1) * factor * factor


def write(cache: Tensor, write_index: Tensor, x: Tensor) -> None:
    """Quantise x [T, Hk, D] into an 8-bit cache, at write_index [T]."""
    page_size = cache.shape[2]
    where = (write_index // page_size, write_index % page_size)
    numbers, scales = quantize(x, cache.dtype)
    all_numbers, all_scales = numbers_and_scales(cache, x.shape[-1])
    all_numbers.transpose(1, 2).index_put_(where, numbers.view(torch.uint8))
    all_scales.transpose(1, 2).index_put_(where, scales)


def dequantize_pages(cache: Tensor, pages: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """The pages [n] of an 8-bit cache -> [n, Hk, page_size, D] of `dtype`."""
    numbers, scales = numbers_and_scales(cache, head_dim)
    wide = numbers[pages].view(cache.dtype).float()
    return (wide * scales[pages].float().unsqueeze(-1)).to(dtype)


def move_tokens(cache: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy tokens within a cache [pages, heads, page_size, width], all of them at once: none sees
    what another one has written.

    source, target  [n] int64: page * page_size + offset of the tokens, no target twice
    """
    page_size = cache.shape[2]
    here, there = (
        (index // page_size, slice(None), index % page_size) for index in (source, target)
    )
    views: tuple[Tensor, ...] = (cache,)
    if is_8_bit(cache.dtype):
        views = numbers_and_scales(cache, cache.shape[3] - KV_SCALE_BYTES)
    for view in views:
        view[there] = view[here]


def kv_cache_shape(
    num_pages: int,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[int, int, int, int]:
    """The shape of one layer's key cache, and of its value cache, of `dtype`."""
    width = head_dim + KV_SCALE_BYTES if is_8_bit(dtype) else head_dim
    return (num_pages, num_kv_heads, page_size, width)


DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_BYTES}

KV_CACHE_DTYPES: dict[str, torch.dtype] = {
    **DTYPES,
    **{name: getattr(torch, torch_name) for name, torch_name in KV_CACHE_8_BIT.items()},
}
