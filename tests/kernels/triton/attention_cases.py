"""Batches of random requests over scattered pages, and the comparison with the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from sapwood.kernels import kv_cache
from sapwood.kernels.attention_batch import PLAIN, AttentionBatch, AttentionTraits
from sapwood.kernels.kv_cache import is_8_bit, kv_cache_shape
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.triton.attention import PagedAttention

REFERENCE = ReferenceKernels()
ATTENTION = PagedAttention()

ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""||difference|| / ||result|| of one token, against the reference on the same inputs in fp32. The
interpreter cuts bfloat16 off, where GPUs round to the nearest: that doubles its error."""


@dataclass(frozen=True)
class Case:
    """A batch and its tensors; see AttentionBatch."""

    q: Tensor
    key_cache: Tensor
    value_cache: Tensor
    batch: AttentionBatch

    def check(self, traits: AttentionTraits = PLAIN) -> Tensor:
        """The result, after it was compared."""
        return self.check_rows(self.q.shape[0], self, traits)

    def check_rows(self, num_rows: int, wanted: Case, traits: AttentionTraits = PLAIN) -> Tensor:
        """The same of the first rows, compared with what the reference makes of `wanted`."""
        scale = self.q.shape[2] ** -0.5
        caches = [
            cache if is_8_bit(cache.dtype) else cache.float()
            for cache in (self.key_cache, self.value_cache)
        ]
        want = REFERENCE.paged_attention(wanted.q.float(), *caches, wanted.batch, scale, traits)
        got = ATTENTION(self.q, self.key_cache, self.value_cache, self.batch, scale, traits)
        assert got.dtype == self.q.dtype
        assert got.shape == self.q.shape
        # Token by token, so that no wrong one hides behind many right ones.
        got, want = got[:num_rows], want[:num_rows]
        error = (got.float() - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
        # Keys and values in 8 bits are rounded to q's dtype, too.
        limit = ERROR[self.q.dtype] * (2 if is_8_bit(self.key_cache.dtype) else 1)
        assert error.max() <= limit, f"largest error of a token {error.max():.1e}"
        return got


def make_case(
    requests: Sequence[tuple[int, int]],
    *,
    heads: tuple[int, int],
    device: torch.device,
    head_dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    prefixes: Sequence[tuple[Sequence[int], int]] = (),
    shows_pages: bool = True,
) -> Case:
    """What no token wrote is NaN, and pages are scattered.

    requests     (new tokens, tokens with them) each; the first ones of one new token are decodes
    heads        query heads, key and value heads
    kv_dtype     of the cache, 8 bits; None: dtype
    prefixes     (requests, pages) each: these requests have their first pages in common
    shows_pages  whether the page table is there on the host
    """
    num_heads, num_kv_heads = heads
    counts = [-(-length // page_size) for _, length in requests]
    free = (torch.randperm(sum(counts)) + 1).tolist()
    pages = [[free.pop() for _ in range(count)] for count in counts]
    for members, num_pages in prefixes:
        for member in members:
            pages[member][:num_pages] = pages[members[0]][:num_pages]
    shape = kv_cache_shape(1 + sum(counts), num_kv_heads, page_size, head_dim)
    caches = [torch.full(shape, torch.nan, dtype=dtype) for _ in "kv"]
    for mine, (_, length) in zip(pages, requests, strict=True):
        for index, page in enumerate(mine):
            written = min(page_size, length - index * page_size)
            for cache in caches:
                entries = torch.randn(num_kv_heads, written, head_dim)
                cache[page, :, :written] = entries.to(dtype)
    table = torch.zeros(len(pages), max(counts) + 1, dtype=torch.int32)
    for row, mine in zip(table, pages, strict=True):
        row[: len(mine)] = torch.tensor(mine, dtype=torch.int32)
    query_lens = tuple(num_new for num_new, _ in requests)
    num_decodes = next((i for i, n in enumerate(query_lens) if n != 1), len(query_lens))
    batch = AttentionBatch(
        page_table=table.to(device),
        query_start=torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32, device=device),
        context_len=torch.tensor([n for _, n in requests], dtype=torch.int32, device=device),
        query_lens=query_lens,
        context_lens=tuple(length for _, length in requests),
        num_decodes=num_decodes,
        host_page_table=table.numpy() if shows_pages else None,
    )
    q = torch.randn(sum(query_lens), num_heads, head_dim).to(dtype)
    if kv_dtype is not None:
        caches = [in_8_bits(cache, kv_dtype) for cache in caches]
    key_cache, value_cache = (cache.to(device) for cache in caches)
    return Case(q.to(device), key_cache, value_cache, batch)


def in_8_bits(cache: Tensor, dtype: torch.dtype) -> Tensor:
    """The same entries; the scales of what no token wrote are NaN."""
    num_pages, num_kv_heads, page_size, head_dim = cache.shape
    packed = torch.zeros(
        kv_cache_shape(num_pages, num_kv_heads, page_size, head_dim, dtype), dtype=torch.uint8
    ).view(dtype)
    numbers, scales = kv_cache.numbers_and_scales(packed, head_dim)
    rounded, of_tokens = kv_cache.quantize(cache, dtype)
    numbers.copy_(rounded.view(torch.uint8))
    scales.copy_(of_tokens)
    return packed
