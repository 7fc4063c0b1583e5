"""Checks of attention and of what is written for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.conformance.checks import Case, Checks, Pair
from sapwood.kernels.interface import Kernels
from sapwood.kernels.kv_cache import LARGEST_NUMBER, dequantize_pages, kv_cache_shape
from sapwood.kernels.texts import group_texts

CHECKS = Checks()


@CHECKS.add("qk_norm_rope_write_kv")
def _write_kv(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    num_tokens, num_pages = 19, 9
    width = (case.num_heads + 2 * case.num_kv_heads) * case.head_dim
    shape = kv_cache_shape(num_pages, case.num_kv_heads, case.page_size, case.head_dim)
    places = torch.randperm(num_pages * case.page_size, generator=case.generator)[:num_tokens]
    for has_norms in (False, True):
        qkv, positions = case.randn(num_tokens, width), case.randint(300, num_tokens)
        cos_sin = case.randn(300, case.head_dim, dtype=torch.float32)
        norms = [case.randn(case.head_dim) if has_norms else None for _ in "qk"]
        found = []
        for ops in (kernels, reference):
            keys, values = (torch.zeros(shape, dtype=case.dtype, device=case.device) for _ in "kv")
            q = ops.qk_norm_rope_write_kv(
                qkv.clone(),
                num_heads=case.num_heads,
                num_kv_heads=case.num_kv_heads,
                head_dim=case.head_dim,
                q_norm=norms[0],
                k_norm=norms[1],
                eps=1e-6,
                cos_sin=cos_sin,
                positions=positions,
                key_cache=keys,
                value_cache=values,
                write_index=places[: len(qkv)].to(case.device),
            )
            found.append((q, keys, values))
        yield from zip(*found, strict=True)


@CHECKS.add("attention of decodes")
def _decodes(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    for requests in ([(1, 1)], [(1, 700)], [(1, 16), (1, 333), (1, 5), (1, 64)]):
        yield _attend(case, requests, kernels, reference)


@CHECKS.add("attention of prompts")
def _prompts(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    for requests in ([(40, 40)], [(9, 260)], [(130, 130), (17, 90)]):
        yield _attend(case, requests, kernels, reference)


@CHECKS.add("attention of a mixed step")
def _mixed(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    yield _attend(case, [(1, 20), (1, 800), (30, 30), (5, 210)], kernels, reference)


def _attend(
    case: Case, requests: Sequence[tuple[int, int]], kernels: Kernels, reference: Kernels
) -> Pair:
    """Attention for requests, (new tokens, context length) each; unwritten KV is NaN."""
    counts = [-(-length // case.page_size) for _, length in requests]
    pages = torch.split(torch.randperm(sum(counts), generator=case.generator) + 1, counts)
    shape = kv_cache_shape(1 + sum(counts), case.num_kv_heads, case.page_size, case.head_dim)
    caches = [torch.full(shape, torch.nan, dtype=case.dtype, device=case.device) for _ in "kv"]
    table = torch.zeros(len(requests), max(counts), dtype=torch.int32)
    for row, ((_, length), own) in enumerate(zip(requests, pages, strict=True)):
        table[row, : len(own)] = own
        for cache in caches:
            tokens = case.randn(case.num_kv_heads, length, case.head_dim)
            for number, page in enumerate(own.tolist()):
                written = tokens[:, number * case.page_size : (number + 1) * case.page_size]
                cache[page, :, : written.shape[1]] = written
    query_lens = tuple(num_new for num_new, _ in requests)
    context_lens = tuple(length for _, length in requests)
    starts = torch.tensor((0, *query_lens)).cumsum(0).to(torch.int32)
    q = case.randn(sum(query_lens), case.num_heads, case.head_dim)

    def batch() -> AttentionBatch:
        return AttentionBatch(
            page_table=table.to(case.device),
            query_start=starts.to(case.device),
            context_len=torch.tensor(context_lens, dtype=torch.int32).to(case.device),
            query_lens=query_lens,
            context_lens=context_lens,
            num_decodes=query_lens.count(1),
        )

    scale = case.head_dim**-0.5
    got, wanted = (
        ops.paged_attention(q, caches[0], caches[1], batch(), scale) for ops in (kernels, reference)
    )
    return got, wanted


@CHECKS.add("8-bit KV cache")
def _kv_in_8_bits(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    """The written values, which are not rotated, and attention to one and the same cache."""
    lengths = (5, 3 * case.page_size, 70)
    num_pages = [-(-length // case.page_size) for length in lengths]
    width = (case.num_heads + 2 * case.num_kv_heads) * case.head_dim
    table = torch.zeros(len(lengths), max(num_pages), dtype=torch.int32)
    first, places = 1, []
    for row, length, num in zip(table, lengths, num_pages, strict=True):
        row[:num] = torch.arange(first, first + num)
        places.append(torch.arange(length) + first * case.page_size)
        first += num
    batch = AttentionBatch(
        page_table=table.to(case.device),
        query_start=torch.arange(4, dtype=torch.int32).to(case.device),
        context_len=torch.tensor(lengths, dtype=torch.int32).to(case.device),
        query_lens=(1, 1, 1),
        context_lens=lengths,
        num_decodes=3,
    )
    for dtype in LARGEST_NUMBER:
        shape = kv_cache_shape(first, case.num_kv_heads, case.page_size, case.head_dim, dtype)
        qkv, found = case.randn(sum(lengths), width), []
        for ops in (kernels, reference):
            caches = [torch.zeros(shape, dtype=torch.uint8, device=case.device) for _ in "kv"]
            keys, values = (cache.view(dtype) for cache in caches)
            ops.qk_norm_rope_write_kv(
                qkv.clone(),
                num_heads=case.num_heads,
                num_kv_heads=case.num_kv_heads,
                head_dim=case.head_dim,
                q_norm=None,
                k_norm=None,
                eps=1e-6,
                cos_sin=torch.ones(1, case.head_dim, device=case.device),
                positions=torch.zeros(sum(lengths), dtype=torch.int64, device=case.device),
                key_cache=keys,
                value_cache=values,
                write_index=torch.cat(places).to(case.device),
            )
            found.append((keys, values))
        pages = torch.arange(first, device=case.device)
        got, wanted = (
            dequantize_pages(values, pages, case.head_dim, torch.float32) for _, values in found
        )
        yield got, wanted
        q = case.randn(3, case.num_heads, case.head_dim)
        got, wanted = (
            ops.paged_attention(q, *found[1], replace(batch, cache={}), case.head_dim**-0.5)
            for ops in (kernels, reference)
        )
        yield got, wanted


@CHECKS.add("attention of whole texts")
def _texts(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    for lengths in ((12,), (5, 17, 5)):
        q, k, v = (case.randn(sum(lengths), case.num_heads, case.head_dim) for _ in "qkv")
        texts = group_texts(lengths, case.device)
        got, wanted = (
            ops.bidirectional_attention(q, k, v, texts, case.head_dim**-0.5)
            for ops in (kernels, reference)
        )
        yield got, wanted
