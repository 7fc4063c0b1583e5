"""Attention in which a token sees its own chunk of the text only.

Source: Meta AI 2025, Llama 4's model code."""

from __future__ import annotations

import torch

from sapwood.kernels.attention_batch import AttentionBatch


def in_chunks(batch: AttentionBatch, chunk: int, page_size: int) -> AttentionBatch:
    """The same new tokens, of which each sees the earlier ones of its chunk alone: chunks are the
    tokens 0 to chunk - 1 of a request, and so on.

    A request becomes one for each chunk that has new tokens of it, with the pages of that chunk, so
    that every implementation of attention can serve. Computed once per step.

    Raises ValueError if a chunk begins within a page."""
    if chunk % page_size:
        raise ValueError(f"a chunk of {chunk} tokens is no number of whole pages of {page_size}")
    key = f"chunks of {chunk}"
    if key not in batch.cache:
        is_decode = batch.num_decodes == len(batch.query_lens)
        batch.cache[key] = (_newest if is_decode else _cut)(batch, chunk, page_size)
    found: AttentionBatch = batch.cache[key]
    return found


def _newest(batch: AttentionBatch, chunk: int, page_size: int) -> AttentionBatch:
    """Of a step of decodes: the chunk of each. Lengths are read on the device, so that a captured
    step stays right for others."""
    start = (batch.context_len - 1) // chunk * chunk
    width = -(-min(chunk, max(batch.context_lens, default=0)) // page_size)
    table, page = batch.page_table, torch.arange(width, device=batch.page_table.device)
    # What is clamped is no page of this chunk, and is not read.
    columns = (start[:, None] // page_size + page).clamp(max=table.shape[1] - 1)
    return AttentionBatch(
        page_table=table.gather(1, columns),
        query_start=batch.query_start,
        context_len=batch.context_len - start,
        query_lens=batch.query_lens,
        context_lens=tuple((length - 1) % chunk + 1 for length in batch.context_lens),
        num_decodes=batch.num_decodes,
    )


def _cut(batch: AttentionBatch, chunk: int, page_size: int) -> AttentionBatch:
    rows: list[int] = []
    first_pages: list[int] = []
    query_lens: list[int] = []
    context_lens: list[int] = []
    for row, (new, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        position = context - new
        while position < context:
            start = position - position % chunk
            end = min(start + chunk, context)
            rows.append(row)
            first_pages.append(start // page_size)
            query_lens.append(end - position)
            context_lens.append(end - start)
            position = end
    table = batch.page_table
    width = -(-max(context_lens, default=0) // page_size)
    first = torch.tensor(first_pages, device=table.device)
    # What is clamped is no page of this chunk, and is not read.
    columns = (first[:, None] + torch.arange(width, device=table.device)).clamp(
        max=table.shape[1] - 1
    )
    starts = torch.tensor([0, *query_lens], device=table.device).cumsum(0)
    return AttentionBatch(
        page_table=table[torch.tensor(rows, device=table.device)[:, None], columns],
        query_start=starts.to(torch.int32),
        context_len=torch.tensor(context_lens, dtype=torch.int32, device=table.device),
        query_lens=tuple(query_lens),
        context_lens=tuple(context_lens),
        num_decodes=batch.num_decodes,
    )
