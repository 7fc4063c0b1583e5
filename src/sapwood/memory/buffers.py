"""The memory behind the pools: the tensors of every layer's cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sapwood.kernels.kv_cache import KV_CACHE_DTYPES, kv_cache_shape
from sapwood.kernels.large_pages import large_pages
from sapwood.schema.cache import CacheGroup, CacheKind, CacheTensor, pools_of


def allocate_caches(
    groups: Sequence[CacheGroup],
    pool_sizes: Sequence[int],
    *,
    page_size: int,
    device: torch.device,
    held: frozenset[int] | None = None,
) -> list[tuple[Tensor, ...]]:
    """Per layer the tensors of its group, in the group's order, all zero.

    groups      with definite dtypes; a layer in no group gets no tensors
    pool_sizes  pages, or slots, of each of `pools_of(groups)`
    held        the layers that get tensors, as in CachePlan; None: all

    A tensor of pages is [pages, heads, page_size, width], as kernels/interface.py says; one of
    states is [slots, *shape of a slot]. Tensors of a group that are alike lie in one piece
    per page, over all its layers: a page that is used for the first time touches one stretch of
    memory instead of two in every layer, and a transfer copies one. On a CPU the operating system
    hands the memory out when it is first written, so a pool that is mostly unused costs little.
    """
    caches: dict[int, tuple[Tensor, ...]] = {}
    for pool, size in zip(pools_of(groups), pool_sizes, strict=True):
        for index in pool.groups:
            group = groups[index]
            caches |= dict.fromkeys(group.layers, ())
            layers = [layer for layer in group.layers if held is None or layer in held]
            if layers:
                held_group = replace(group, layers=tuple(layers))
                caches |= _allocate_group(held_group, size, page_size, device)
    return [caches.get(layer, ()) for layer in range(1 + max(caches, default=-1))]


def whole_pools(caches: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """Caches of pages, of one or more layers, as tensors that have all of them together.

    caches   of `allocate_caches`, [pages, heads, page_size, width] each
    Returns  per piece of memory [pages, heads of all layers, page_size, width]
    """
    first_of: dict[int, Tensor] = {}
    for tensor in (tensor for layer in caches for tensor in layer):
        key = tensor.untyped_storage().data_ptr()
        known = first_of.get(key)
        if known is None or tensor.storage_offset() < known.storage_offset():
            first_of[key] = tensor
    pools = []
    for tensor in first_of.values():
        pages, _, page_size, width = tensor.shape
        page, head = tensor.stride(0), page_size * width
        pools.append(
            tensor.as_strided((pages, page // head, page_size, width), (page, head, width, 1))
        )
    return pools


def page_rows(caches: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """The memory of caches of `allocate_caches` as bytes, a row for each page or slot.

    caches   of all layers of one pool
    Returns  per piece of memory [pages, bytes of a page in it], uint8
    """
    pieces: dict[int, Tensor] = {}
    for tensor in (tensor for layer in caches for tensor in layer):
        key = tensor.untyped_storage().data_ptr()
        known = pieces.get(key)
        if known is None or tensor.storage_offset() < known.storage_offset():
            pieces[key] = tensor
    rows = []
    for first in pieces.values():
        size = first.dtype.itemsize
        whole = torch.empty(0, dtype=torch.uint8, device=first.device)
        page_bytes = first.stride(0) * size
        whole.set_(
            first.untyped_storage(),
            first.storage_offset() * size,
            (first.shape[0], page_bytes),
            (page_bytes, 1),
        )
        rows.append(whole)
    return rows


def _allocate_group(
    group: CacheGroup, size: int, page_size: int, device: torch.device
) -> dict[int, tuple[Tensor, ...]]:
    tensors = list(group.tensors.values())
    pieces: dict[CacheTensor, Iterator[Tensor]] = {}
    for tensor in tensors:
        if tensor in pieces:
            continue
        num_alike = tensors.count(tensor)
        unit = _unit_shape(group, tensor, page_size)
        dtype = KV_CACHE_DTYPES[tensor.dtype]
        pool = _zeros((size, len(group.layers), num_alike, *unit), dtype, device)
        layers = range(len(group.layers))
        pieces[tensor] = iter([pool[:, at, index] for at in layers for index in range(num_alike)])
    return {layer: tuple(next(pieces[tensor]) for tensor in tensors) for layer in group.layers}


def _unit_shape(group: CacheGroup, tensor: CacheTensor, page_size: int) -> tuple[int, ...]:
    """The shape of a slot, or of a page, whose tokens come before the last dimension."""
    if group.kind is CacheKind.STATE:
        return tensor.shape
    num_heads, width = tensor.shape
    return kv_cache_shape(1, num_heads, page_size, width, KV_CACHE_DTYPES[tensor.dtype])[1:]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return large_pages(num_bytes)[:num_bytes].view(dtype).view(shape)
