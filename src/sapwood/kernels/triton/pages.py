"""Copies of whole KV pages: between pages of one pool, and to and from pinned host memory."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from sapwood.kernels.transfer import upload_one

_BLOCK = 4096


@triton.jit
def _copy_pages(
    source_ptr,
    target_ptr,
    pairs_ptr,
    width,
    source_stride,
    target_stride,
    BLOCK: tl.constexpr,
):
    pair = pairs_ptr + 2 * tl.program_id(0)
    source = source_ptr + tl.load(pair) * source_stride
    target = target_ptr + tl.load(pair + 1) * target_stride
    place = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    tl.store(target + place, tl.load(source + place, mask=inside), mask=inside)


def page_rows(kv_caches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The KV caches of all layers as one row per page, [num_pages, numbers of a page].

    Raises ValueError if the pages are not each one piece of memory, as
    memory/buffers.py allocates them."""
    first = kv_caches[0][0]
    width = first.stride(0)
    numbers = first[0].numel()
    places = [cache.data_ptr() for pair in kv_caches for cache in pair]
    step = numbers * first.element_size()
    if (
        places != [places[0] + i * step for i in range(len(places))]
        or len(places) * numbers != width
    ):
        raise ValueError("the layers of a page are not one piece of memory")
    return first.as_strided((first.shape[0], width), (width, 1))


def copy_pages(source: Tensor, target: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """target[b] = source[a] for each (a, b) of `pairs`, in one launch that nobody waits for.

    source, target  [pages, n] of one dtype, each row one piece (see `page_rows`); the same pool
                    twice, or one of them pinned host memory, which the GPU reads and writes over
                    the bus. Before the host reads what was copied there, it must synchronise.
    Raises          ValueError if a page does not exist, is written twice, or is both read and
                    written (their order is not defined); or if rows differ or are not pinned
    """
    _check(source, target, pairs)
    if not pairs:
        return
    device = target.device if source.device.type == "cpu" else source.device
    on_device = upload_one(np.array(pairs), np.int64, device)
    wide = _widest(source, target)
    source, target = source.view(wide), target.view(wide)
    width = source.shape[1]
    _copy_pages[(len(pairs), triton.cdiv(width, _BLOCK))](
        source, target, on_device, width, source.stride(0), target.stride(0),
        BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip


def _check(source: Tensor, target: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    if source.dtype != target.dtype or source.shape[1] != target.shape[1]:
        raise ValueError(
            f"pages of {source.shape[1]} {source.dtype} cannot be copied to pages of "
            f"{target.shape[1]} {target.dtype}"
        )
    if source.stride(1) != 1 or target.stride(1) != 1:
        raise ValueError("a page must be one piece of memory")
    is_cuda = {tensor.device.type for tensor in (source, target)} == {"cpu", "cuda"}
    if is_cuda and not (source if source.device.type == "cpu" else target).is_pinned():
        raise ValueError("the host's pages are not pinned; allocate them with pin_memory=True")
    written = [to for _, to in pairs]
    for place, tensor in ((0, source), (1, target)):
        pages = [pair[place] for pair in pairs]
        if pages and not 0 <= min(pages) <= max(pages) < tensor.shape[0]:
            raise ValueError(f"pages {sorted(set(pages))} are not all below {tensor.shape[0]}")
    if len(set(written)) != len(written):
        raise ValueError("a page is written twice")
    if source.data_ptr() == target.data_ptr() and not {a for a, _ in pairs}.isdisjoint(written):
        raise ValueError("a page is both read and written; copy in two calls")


def _widest(source: Tensor, target: Tensor) -> torch.dtype:
    """The widest whole numbers that rows can be seen as."""
    for dtype in (torch.int64, torch.int32, torch.int16):
        parts = dtype.itemsize // source.element_size() or 1
        sizes = (source.shape[1], source.stride(0), target.stride(0))
        offsets = (source.data_ptr(), target.data_ptr())
        if dtype.itemsize >= source.element_size() and not any(
            [*(size % parts for size in sizes), *(offset % dtype.itemsize for offset in offsets)]
        ):
            return dtype
    return torch.int8 if source.element_size() == 1 else source.dtype
