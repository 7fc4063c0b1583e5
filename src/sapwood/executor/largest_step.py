"""Runs the steps that take the most memory once, to measure how much they take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sapwood.executor.captured import Capturable
from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.interface import Kernels
from sapwood.kernels.sampling_settings import SamplingSettings
from sapwood.layers.forward_batch import CacheInputs, ForwardBatch


@torch.inference_mode()
def run_largest_steps(
    model: Capturable,
    kernels: Kernels,
    page: list[tuple[Tensor, ...]],
    *,
    page_size: int,
    group_of_layer: Sequence[int] = (),
    num_tokens: int,
    num_requests: int,
    max_pages: int,
    device: torch.device,
    chooses_tokens: bool = True,
) -> None:
    """Run a prompt of `num_tokens`, then a step of `num_requests` decodes.

    page            caches of a single page, or slot, which all tokens read and write: the results
                    do not matter
    group_of_layer  as in ForwardBatch
    chooses_tokens  whether this rank computes logits and samples"""
    for requests in {1, min(num_requests, num_tokens)}:
        batch = _batch(
            page, page_size, group_of_layer, num_tokens // requests, requests, max_pages, device
        )
        hidden = model.forward(batch)
        if not chooses_tokens:
            continue
        logits = model.logits(hidden.index_select(0, batch.logits_index))
        settings = SamplingSettings(
            temperature=[1.0] * requests,
            top_k=[-1] * requests,
            top_p=[0.9] * requests,
            min_p=[0.0] * requests,
            numbers=[0.5] * requests,
        )
        kernels.sample(logits, settings)


def _batch(
    page: list[tuple[Tensor, ...]],
    page_size: int,
    group_of_layer: Sequence[int],
    num_new: int,
    num_requests: int,
    max_pages: int,
    device: torch.device,
) -> ForwardBatch:
    context = min(num_new, max_pages * page_size)
    positions = torch.arange(context, device=device).repeat(num_requests)
    ends = torch.arange(num_requests + 1, device=device) * context
    inputs = CacheInputs(
        write_index=positions % page_size,
        attention=AttentionBatch(
            page_table=torch.zeros(num_requests, max_pages, dtype=torch.int32, device=device),
            query_start=ends.to(torch.int32),
            context_len=torch.full((num_requests,), context, dtype=torch.int32, device=device),
            query_lens=(context,) * num_requests,
            context_lens=(context,) * num_requests,
            num_decodes=num_requests if context == 1 else 0,
        ),
        slots=torch.zeros(num_requests, dtype=torch.int64, device=device),
    )
    return ForwardBatch(
        token_ids=torch.zeros_like(positions),
        positions=positions,
        write_index=inputs.write_index,
        attention=inputs.attention,
        groups=[inputs] * (1 + max(group_of_layer, default=-1)),
        group_of_layer=group_of_layer,
        kv_caches=page,
        logits_index=ends[1:] - 1,
    )
