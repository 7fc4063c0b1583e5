"""From a plan of the scheduler to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood.executor.rows import RowTable
from sapwood.kernels.interface import AttentionBatch
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.schema.step import StepPlan


def build_forward_batch(
    plan: StepPlan,
    rows: RowTable,
    *,
    page_size: int,
    kv_caches: Sequence[tuple[Tensor, Tensor]],
    device: torch.device,
) -> ForwardBatch:
    """The tokens of `plan`, in its order. Tables of `rows` are up to date with the plan."""
    scheduled = plan.scheduled
    row = np.array([entry.row for entry in scheduled], dtype=np.int64)
    query_lens = [entry.num_new for entry in scheduled]
    lens = np.array(query_lens, dtype=np.int64)
    first_position = np.array([entry.position for entry in scheduled], dtype=np.int64)
    ends = np.cumsum(lens)
    starts = ends - lens
    num_tokens = int(ends[-1])

    row_of_token = np.repeat(row, lens)
    positions = np.arange(num_tokens) - np.repeat(starts - first_position, lens)
    pages = rows.page_table[row_of_token, positions // page_size].astype(np.int64)
    write_index = pages * page_size + positions % page_size

    context_lens = first_position + lens
    max_pages = -(-int(context_lens.max()) // page_size)
    page_table = rows.page_table[row, :max_pages]
    # A row may still hold pages of its previous request behind the ones in use.
    in_use = np.arange(max_pages) < -(-context_lens // page_size)[:, None]
    page_table = np.where(in_use, page_table, 0).astype(np.int32)

    query_start = np.concatenate(([0], ends)).astype(np.int32)
    logits_rows = [
        end - 1
        for end, entry in zip(ends.tolist(), scheduled, strict=True)
        if entry.num_output is not None
    ]

    def to_device(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return ForwardBatch(
        token_ids=_token_ids(plan, rows, starts, num_tokens, device),
        positions=to_device(positions),
        write_index=to_device(write_index),
        attention=AttentionBatch(
            page_table=to_device(page_table),
            query_start=to_device(query_start),
            context_len=to_device(context_lens.astype(np.int32)),
            query_lens=tuple(query_lens),
            context_lens=tuple(context_lens.tolist()),
            num_decodes=sum(1 for length in query_lens if length == 1),
        ),
        kv_caches=kv_caches,
        logits_index=to_device(np.array(logits_rows, dtype=np.int64)),
    )


def _token_ids(
    plan: StepPlan,
    rows: RowTable,
    starts: NDArray[np.int64],
    num_tokens: int,
    device: torch.device,
) -> Tensor:
    """[num_tokens] int64; tokens that only the device knows yet are filled in on the device."""
    ids = np.zeros(num_tokens, dtype=np.int64)
    sampled_at: list[int] = []
    sampled_row: list[int] = []
    for start, entry in zip(starts.tolist(), plan.scheduled, strict=True):
        if entry.token_ids:
            ids[start : start + len(entry.token_ids)] = entry.token_ids
        else:
            sampled_at.append(start)
            sampled_row.append(entry.row)
    token_ids = torch.from_numpy(ids).to(device)
    if sampled_at:
        at = torch.tensor(sampled_at, device=device)
        token_ids[at] = rows.last_tokens[torch.tensor(sampled_row, device=device)]
    return token_ids
