"""From a plan of the scheduler to the tensors of one forward pass.

At one token per request, careless code would take a tenth of a small model's step here, so all
arrays are made in few calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood.executor.cache_inputs import CachePlaces
from sapwood.executor.rows import RowTable
from sapwood.executor.sight import Sight
from sapwood.executor.trees import lay_out
from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.transfer import upload, upload_one
from sapwood.layers.adapters import StepAdapters
from sapwood.layers.forward_batch import CacheInputs, ForwardBatch, InputEmbeds
from sapwood.schema.step import ScheduledTokens, StepPlan

ONE_GROUP = CachePlaces()
"""A model whose layers keep every token, all in the same way."""


class AdaptersOfStep(Protocol):
    def __call__(
        self, slot_of_token: NDArray[np.int64], selected: NDArray[np.int64]
    ) -> StepAdapters | None:
        """As lora.pool.AdapterPool.of_step."""
        ...


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A forward pass, and the requests that sample tokens after it.

    sampling       the entries of the plan that sample, in the plan's order
    sampling_rows  int64 on the device: the rows of these entries
    """

    batch: ForwardBatch
    sampling: list[ScheduledTokens]
    sampling_rows: Tensor


def build_inputs(
    plan: StepPlan,
    rows: RowTable,
    *,
    page_size: int,
    kv_caches: Sequence[tuple[Tensor, ...]],
    device: torch.device,
    places: CachePlaces = ONE_GROUP,
    adapters: AdaptersOfStep | None = None,
    takes_embeds: bool = True,
    sight: Sight | None = None,
) -> StepInputs:
    """The inputs of a plan's step, in the plan's order; `rows` must have taken the plan over.

    places    tells where the model's cache groups find their pages and states
    adapters  finds the rows with adapters; None: there are no adapters
    takes_embeds  whether vectors in the place of tokens are taken from `rows`; each is taken once
    sight     has the vectors and positions of what prompts show; None: they show nothing
    """
    scheduled = plan.scheduled
    query_lens = [entry.num_new for entry in scheduled]
    first_positions = [entry.position for entry in scheduled]
    context_lens = [first + new for first, new in zip(first_positions, query_lens, strict=True)]
    row, first_position, lens, context_len = np.array(
        [[entry.row for entry in scheduled], first_positions, query_lens, context_lens],
        dtype=np.int64,
    )
    ends = lens.cumsum()
    starts_of_entries = ends - lens
    num_tokens = int(ends[-1])
    row_of_token, positions = row, first_position
    if num_tokens > len(scheduled):
        row_of_token = row.repeat(lens)
        positions = np.arange(num_tokens) - (ends - context_len).repeat(lens)
    index_in_row, offset = np.divmod(positions, page_size)
    table = places.first_table(rows)
    pages = table[row_of_token, index_in_row]

    query_start = np.zeros(len(scheduled) + 1, dtype=np.int32)
    query_start[1:] = ends
    max_pages = -(-max(context_lens) // page_size)
    host_page_table = table[row, :max_pages]
    sampling = [entry for entry in scheduled if entry.num_output is not None]
    samples = [index for index, entry in enumerate(scheduled) if entry.num_output is not None]
    sampled_after = ends[samples] - 1
    if any(entry.draft_ids for entry in sampling):
        starts_of = starts_of_entries[samples].tolist()
        sampled_after = np.array(
            [
                start + offset
                for start, entry in zip(starts_of, sampling, strict=True)
                for offset in entry.logits_for
            ],
            dtype=np.int64,
        )

    known, unknown_at, unknown_row = _token_ids(plan, starts_of_entries)
    tree = lay_out(scheduled, starts_of_entries.tolist(), positions)
    by_depth, sees = (positions, None) if tree is None else tree
    row_positions = by_depth + rows.first_positions[row_of_token]
    axes = None
    if sight is not None and sight.has_rows:
        row_positions, axes = sight.positions(scheduled, row_positions)
    (
        token_ids,
        at,
        of_row,
        positions_there,
        write_index,
        logits_index,
        sampling_rows,
        page_table,
        starts,
        context_len_there,
    ) = upload(
        [
            known,
            unknown_at,
            unknown_row,
            row_positions,
            pages * np.int64(page_size) + offset,
            sampled_after,
            row[samples],
            host_page_table,
            query_start,
            context_len.astype(np.int32),
        ],
        device,
    )
    if len(unknown_at):
        token_ids.index_copy_(0, at, rows.last_tokens.index_select(0, of_row))
    attention = AttentionBatch(
        page_table=page_table,
        query_start=starts,
        context_len=context_len_there,
        query_lens=tuple(query_lens),
        context_lens=tuple(context_lens),
        num_decodes=query_lens.count(1),
        # A window's table has old pages, which nobody shares.
        host_page_table=None if places.is_window_first else host_page_table,
        sees=None if sees is None else upload_one(sees, np.int64, device),
        both_ways=() if sight is None else sight.both_ways(scheduled),
    )
    groups: tuple[CacheInputs, ...] = ()
    if places.group_of_layer:
        groups = places.of_step(
            rows,
            CacheInputs(write_index=write_index, attention=attention),
            row=row,
            row_of_token=row_of_token,
            index_in_row=index_in_row,
            offset=offset,
            page_size=page_size,
            device=device,
        )
    embeds = _embeds(scheduled, rows, device) if takes_embeds and rows.embeds else None
    if sight is not None and sight.has_rows:
        embeds = sight.embeds(scheduled, embeds)
    batch = ForwardBatch(
        token_ids=token_ids,
        positions=positions_there,
        write_index=write_index,
        attention=attention,
        groups=groups,
        group_of_layer=places.group_of_layer,
        kv_caches=kv_caches,
        logits_index=logits_index,
        embeds=embeds,
        axes=axes,
        across=() if sight is None else sight.across(scheduled),
        adapters=None
        if adapters is None
        else adapters(rows.adapter_slot_of(row_of_token, positions), sampled_after),
    )
    return StepInputs(batch, sampling, sampling_rows)


def _embeds(
    scheduled: Sequence[ScheduledTokens], rows: RowTable, device: torch.device
) -> InputEmbeds | None:
    at, pieces = rows.take_embeds(scheduled)
    if not pieces:
        return None
    places, vectors = upload([np.array(at, dtype=np.int64), np.concatenate(pieces)], device)
    return InputEmbeds(places, vectors)


def _token_ids(
    plan: StepPlan, starts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(the step's token ids, places of unknown ids, rows of unknown ids)

    The id of a token that only the device knows yet is 0 here; the row that sampled it has the id.
    """
    known: list[int] = []
    unknown_at: list[int] = []
    unknown_row: list[int] = []
    for start, entry in zip(starts.tolist(), plan.scheduled, strict=True):
        known += entry.token_ids or [0]
        known += entry.draft_ids
        if not entry.token_ids:
            unknown_at.append(start)
            unknown_row.append(entry.row)
    return (
        np.array(known, dtype=np.int64),
        np.array(unknown_at, dtype=np.int64),
        np.array(unknown_row, dtype=np.int64),
    )
