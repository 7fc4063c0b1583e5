"""Runs the steps that take the most memory once, to measure how much they take."""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.executor.captured import Capturable
from sapwood.kernels.interface import AttentionBatch, Kernels
from sapwood.kernels.sampling_settings import SamplingSettings
from sapwood.layers.forward_batch import ForwardBatch


@torch.inference_mode()
def run_largest_steps(
    model: Capturable,
    kernels: Kernels,
    page: list[tuple[Tensor, Tensor]],
    *,
    num_tokens: int,
    num_requests: int,
    max_pages: int,
    device: torch.device,
) -> None:
    """Run a prompt of `num_tokens`, then a step of `num_requests` decodes.

    `page` is a KV cache of a single page, which all tokens read and write: the results do not
    matter."""
    for requests in {1, min(num_requests, num_tokens)}:
        batch = _batch(page, num_tokens // requests, requests, max_pages, device)
        hidden = model.forward(batch).index_select(0, batch.logits_index)
        logits = model.logits(hidden)
        settings = SamplingSettings(
            temperature=[1.0] * requests,
            top_k=[-1] * requests,
            top_p=[0.9] * requests,
            min_p=[0.0] * requests,
            numbers=[0.5] * requests,
        )
        kernels.sample(logits, settings)


def _batch(
    page: list[tuple[Tensor, Tensor]],
    num_new: int,
    num_requests: int,
    max_pages: int,
    device: torch.device,
) -> ForwardBatch:
    page_size = page[0][0].shape[2]
    context = min(num_new, max_pages * page_size)
    positions = torch.arange(context, device=device).repeat(num_requests)
    ends = torch.arange(num_requests + 1, device=device) * context
    return ForwardBatch(
        token_ids=torch.zeros_like(positions),
        positions=positions,
        write_index=positions % page_size,
        attention=AttentionBatch(
            page_table=torch.zeros(num_requests, max_pages, dtype=torch.int32, device=device),
            query_start=ends.to(torch.int32),
            context_len=torch.full((num_requests,), context, dtype=torch.int32, device=device),
            query_lens=(context,) * num_requests,
            context_lens=(context,) * num_requests,
            num_decodes=num_requests if context == 1 else 0,
        ),
        kv_caches=page,
        logits_index=ends[1:] - 1,
    )
