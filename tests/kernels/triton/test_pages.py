"""Copies of KV pages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sapwood.kernels.triton.pages import copy_pages, page_rows
from sapwood.memory.buffers import allocate_kv_caches


def make_pool(
    device: torch.device, dtype: torch.dtype
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    caches = allocate_kv_caches(
        num_layers=3, num_pages=7, num_kv_heads=2, page_size=3, head_dim=5, dtype=dtype,
        device=device,
    )  # fmt: skip
    rows = page_rows(caches)
    for cache in (cache for pair in caches for cache in pair):
        cache.copy_(torch.randn(cache.shape))
    return caches, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_of_one_pool(device: torch.device, dtype: torch.dtype) -> None:
    caches, rows = make_pool(device, dtype)
    before = [(keys.clone(), values.clone()) for keys, values in caches]
    copy_pages(rows, rows, [(0, 6), (2, 1), (0, 3)])
    copy_pages(rows, rows, [])
    expected = [0, 2, 2, 0, 4, 5, 0]
    for now, then in zip(caches, before, strict=True):
        for one, other in zip(now, then, strict=True):
            assert torch.equal(one, other[expected])


def test_to_and_from_the_host(device: torch.device) -> None:
    _, rows = make_pool(device, torch.bfloat16)
    before = rows.clone()
    host = torch.zeros(2, rows.shape[1], dtype=rows.dtype, pin_memory=device.type == "cuda")
    copy_pages(rows, host, [(4, 1), (5, 0)])
    copy_pages(host, rows, [(1, 0)])
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(host, before[[5, 4]].cpu())
    assert torch.equal(rows[0], before[4])
    assert torch.equal(rows[1:], before[1:])


def test_what_cannot_be_copied(device: torch.device) -> None:
    caches, rows = make_pool(device, torch.float32)
    for pairs, match in (
        ([(0, 7)], r"pages \[7\] are not all below 7"),
        ([(-1, 2)], "are not all below 7"),
        ([(0, 1), (2, 1)], "written twice"),
        ([(0, 1), (1, 2)], "both read and written"),
    ):
        with pytest.raises(ValueError, match=match):
            copy_pages(rows, rows, pairs)
    with pytest.raises(ValueError, match=r"pages of 180 torch.float32 cannot be copied to pages"):
        copy_pages(rows, rows.bfloat16(), [(0, 1)])
    with pytest.raises(ValueError, match="one piece of memory"):
        page_rows([(keys.clone(), values) for keys, values in caches])
