"""The table of running requests that a rank keeps between steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import RowStart, ScheduledTokens


class RowTable:
    """One row per running request; the scheduler decides which request has which row.

    page_table   [num_rows, max_pages] int32, on the host; 0 where the row's request has no page; of
                 the pool that keeps every token
    window_tables  the same for each window pool; pages before a row's window are old ones
    slots        [num_rows]; the slot of each row's state
    first_positions  [num_rows]; as RowStart.first_position
    adapter_slots  [num_rows]; the slot of each row's adapter, or -1
    adapter_starts  [num_rows]; the first token that has it
    last_tokens  [num_rows] int64, on the device; the token sampled last
    epochs       [num_rows]; how many requests have had the row so far
    embeds       row -> [prompt tokens, hidden] fp32, on the host, for requests with input_embeds,
                 until the prompt is computed
    """

    def __init__(
        self, *, num_rows: int, max_pages: int, device: torch.device, num_windows: int = 0
    ) -> None:
        self.page_table: NDArray[np.int32] = np.zeros((num_rows, max_pages), dtype=np.int32)
        self.window_tables = [np.zeros_like(self.page_table) for _ in range(num_windows)]
        self.slots: NDArray[np.int64] = np.zeros(num_rows, dtype=np.int64)
        self.first_positions: NDArray[np.int64] = np.zeros(num_rows, dtype=np.int64)
        self.adapter_slots: NDArray[np.int64] = np.full(num_rows, -1, dtype=np.int64)
        self.adapter_starts: NDArray[np.int64] = np.zeros(num_rows, dtype=np.int64)
        self.last_tokens: Tensor = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.seeds: NDArray[np.uint64] = np.zeros(num_rows, dtype=np.uint64)
        self.sampling: list[SamplingParams] = [SamplingParams()] * num_rows
        self.epochs: list[int] = [0] * num_rows
        self.embeds: dict[int, NDArray[np.float32]] = {}

    def start(self, start: RowStart) -> None:
        self.sampling[start.row] = start.options.sampling
        self.epochs[start.row] += 1
        self.seeds[start.row] = start.seed % 2**64
        self.first_positions[start.row] = start.first_position
        self.adapter_slots[start.row] = start.adapter_slot
        self.adapter_starts[start.row] = start.adapter_start
        self.page_table[start.row] = 0
        for table in self.window_tables:
            table[start.row] = 0
        self.embeds.pop(start.row, None)
        if start.input_embeds:
            vectors = [np.frombuffer(vector, dtype="<f4") for vector in start.input_embeds]
            self.embeds[start.row] = np.stack(vectors)

    def adapter_slot_of(
        self, row_of_token: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """[T] the slot of the adapter that each token of a step has, or -1.

        row_of_token, positions  [T] the tokens' rows, and indices in their requests"""
        is_active = positions >= self.adapter_starts[row_of_token]
        return np.where(is_active, self.adapter_slots[row_of_token], -1)

    def take_embeds(
        self, scheduled: Sequence[ScheduledTokens]
    ) -> tuple[list[int], list[NDArray[np.float32]]]:
        """(places in the step, input embeddings of the tokens there), piece by piece.

        Only for requests with input_embeds.
        """
        at: list[int] = []
        pieces: list[NDArray[np.float32]] = []
        start = 0
        for entry in scheduled:
            embeds = self.embeds.get(entry.row)
            if embeds is not None:
                end = entry.position + entry.num_new
                pieces.append(embeds[entry.position : end])
                at += range(start, start + len(pieces[-1]))
                if end >= len(embeds):
                    del self.embeds[entry.row]
            start += entry.num_new
        return at, pieces

    def take_pages(self, scheduled: ScheduledTokens) -> None:
        if scheduled.pages:
            end = scheduled.first_page + len(scheduled.pages)
            self.page_table[scheduled.row, scheduled.first_page : end] = scheduled.pages
        if scheduled.windows:
            for table, (first, pages) in zip(self.window_tables, scheduled.windows, strict=True):
                table[scheduled.row, first : first + len(pages)] = pages
        if scheduled.slot >= 0:
            self.slots[scheduled.row] = scheduled.slot
