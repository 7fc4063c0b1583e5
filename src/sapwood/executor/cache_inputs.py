"""Where each cache group of a model finds its pages and its states in a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood.executor.rows import RowTable
from sapwood.kernels.torch_ops.rows import copy_rows
from sapwood.kernels.transfer import upload
from sapwood.layers.forward_batch import CacheInputs
from sapwood.schema.cache import CacheGroup, CacheKind, CachePool, pools_of
from sapwood.schema.step import ScheduledTokens


class CachePlaces:
    """Knows which of a row's tables belongs to which group.

    group_of_layer  per layer the index of its group; empty if the model has at most one group
    """

    def __init__(
        self,
        groups: Sequence[CacheGroup] = (),
        copy_rows: Callable[[Tensor, Tensor, Tensor], None] = copy_rows,
        *,
        pools: Sequence[CachePool] | None = None,
    ) -> None:
        """groups  of the model; empty for a model of one group that keeps every token
        copy_rows  the kernels' op, which copies states
        pools      those whose tables the rows have, if they serve a second model too; None: those
                   of `groups`"""
        self._copy_rows = copy_rows
        every = pools_of(groups) if pools is None else pools
        windows = [pool.window for pool in every if pool.window is not None]
        own = sorted({windows.index(group.window) for group in groups if group.window is not None})
        self._keeps_all = not groups or any(
            group.kind in (CacheKind.FULL, CacheKind.LATENT) for group in groups
        )
        self._window_tables = own
        self._window_of_group = {
            index: own.index(windows.index(group.window))
            for index, group in enumerate(groups)
            if group.window is not None
        }
        self._state_groups = {
            index for index, group in enumerate(groups) if group.kind is CacheKind.STATE
        }
        self._num_groups = len(groups)
        self._state_layers = tuple(
            chain.from_iterable(groups[index].layers for index in sorted(self._state_groups))
        )
        self.group_of_layer: tuple[int, ...] = ()
        if len(groups) > 1 or self._state_groups:
            of_layer = {layer: at for at, group in enumerate(groups) for layer in group.layers}
            # Nobody asks for the group of a layer that keeps nothing.
            self.group_of_layer = tuple(
                of_layer.get(layer, 0) for layer in range(1 + max(of_layer))
            )

    @property
    def is_window_first(self) -> bool:
        """Whether the table of the batch itself is that of the first window pool."""
        return not self._keeps_all and bool(self._window_tables)

    def first_table(self, rows: RowTable) -> NDArray[np.int32]:
        """The table that the batch itself has."""
        if self.is_window_first:
            return rows.window_tables[self._window_tables[0]]
        return rows.page_table

    def copy_states(
        self,
        scheduled: Sequence[ScheduledTokens],
        caches: Sequence[tuple[Tensor, ...]],
        device: torch.device,
    ) -> None:
        """Carry out the plan's copies of states, all of them at once."""
        if not self._state_layers:
            return
        copies = [copy for entry in scheduled for copy in entry.copies]
        if not copies:
            return
        source, target = upload(list(np.array(copies, dtype=np.int64).T.copy()), device)
        for layer in self._state_layers:
            for tensor in caches[layer]:
                self._copy_rows(tensor, source, target)

    def of_step(
        self,
        rows: RowTable,
        first: CacheInputs,
        *,
        row: NDArray[np.int64],
        row_of_token: NDArray[np.int64],
        index_in_row: NDArray[np.int64],
        offset: NDArray[np.int64],
        page_size: int,
        device: torch.device,
    ) -> tuple[CacheInputs, ...]:
        """One value per group; empty if the batch itself has what the one group needs.

        first         what the batch itself has
        row           [R] of each request
        row_of_token  [T]; index_in_row [T] the index of a token's page; offset [T] within it
        """
        if not self.group_of_layer:
            return ()
        max_pages = first.attention.page_table.shape[1]
        arrays: list[NDArray[np.int64] | NDArray[np.int32]] = [rows.slots[row]]
        for index in self._window_tables[1 if self.is_window_first else 0 :]:
            table = rows.window_tables[index]
            pages = table[row_of_token, index_in_row]
            arrays += [pages * np.int64(page_size) + offset, table[row, :max_pages]]
        slots, *others = upload(arrays, device)
        windows = [first] if self.is_window_first else []
        for at in range(0, len(others), 2):
            # What kernels compute once for a table is of that table, and a window's has old pages.
            attention = replace(
                first.attention, page_table=others[at + 1], cache={}, host_page_table=None
            )
            windows.append(CacheInputs(write_index=others[at], attention=attention))
        found = []
        for group in range(self._num_groups):
            if group in self._state_groups:
                found.append(replace(first, slots=slots))
            elif group in self._window_of_group:
                found.append(windows[self._window_of_group[group]])
            else:
                found.append(first)
        return tuple(found)
