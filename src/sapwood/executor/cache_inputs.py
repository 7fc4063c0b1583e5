"""Where each cache group of a model finds its pages and its states in a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, slots=True)
class GroupPlace:
    """What a cache group has of a step.

    table      its page table, of those of the step; 0 is that of the batch itself
    has_slots  whether it has slots of states
    """

    table: int
    has_slots: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SparePlaces:
    """Where tokens of no request may write.

    pages  a page that no request has, for each page table
    slot   a slot that no request has; None: there are no states
    """

    pages: tuple[int, ...]
    slot: int | None = None


class CachePlaces:
    """Knows which of a row's tables belongs to which group.

    group_of_layer  per layer the index of its group; empty if the model has at most one group
    of_groups       what each group has of a step; empty if `group_of_layer` is
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
        kinds = {group.kind for group in groups}
        self._keeps_all = not groups or bool(kinds & {CacheKind.FULL, CacheKind.LATENT})
        self._keeps_pages = not groups or CacheKind.FULL in kinds
        self._window_tables = own
        self._state_layers = tuple(
            chain.from_iterable(group.layers for group in groups if group.kind is CacheKind.STATE)
        )
        first_window = 0 if self.is_window_first else 1
        self._pools = every
        self._pool_of_table = [] if self.is_window_first else [_index_of(every, None)]
        self._pool_of_table += [_index_of(every, windows[index]) for index in own]
        self.of_groups: tuple[GroupPlace, ...] = ()
        self.group_of_layer: tuple[int, ...] = ()
        if len(groups) > 1 or self._state_layers:
            self.of_groups = tuple(
                GroupPlace(0, group.kind is CacheKind.STATE)
                if group.window is None
                else GroupPlace(first_window + own.index(windows.index(group.window)))
                for group in groups
            )
            of_layer = {layer: at for at, group in enumerate(groups) for layer in group.layers}
            # Nobody asks for the group of a layer that keeps nothing.
            self.group_of_layer = tuple(
                of_layer.get(layer, 0) for layer in range(1 + max(of_layer))
            )

    @property
    def is_window_first(self) -> bool:
        """Whether the table of the batch itself is that of the first window pool."""
        return not self._keeps_all and bool(self._window_tables)

    @property
    def shares_pages(self) -> bool:
        """Whether the batch's own table has keys and values that requests may share."""
        return self._keeps_pages and not self.is_window_first

    def spares(self, pool_sizes: Sequence[int]) -> SparePlaces:
        """Places after the last that requests get.

        pool_sizes  what requests get of each pool whose tables the rows have"""
        slots = [at for at, pool in enumerate(self._pools) if pool.kind is CacheKind.STATE]
        return SparePlaces(
            # A model that keeps states alone writes to no page.
            pages=tuple(0 if at is None else pool_sizes[at] for at in self._pool_of_table),
            slot=pool_sizes[slots[0]] if self._state_layers else None,
        )

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
        tables = [first]
        for at in range(0, len(others), 2):
            # What kernels compute once for a table is of that table, and a window's has old pages.
            attention = replace(
                first.attention, page_table=others[at + 1], cache={}, host_page_table=None
            )
            tables.append(CacheInputs(write_index=others[at], attention=attention))
        return inputs_of_groups(self.of_groups, tables, slots)


def inputs_of_groups(
    places: Sequence[GroupPlace], tables: Sequence[CacheInputs], slots: Tensor | None
) -> tuple[CacheInputs, ...]:
    """What each group has of a step with these page tables and slots."""
    with_slots = replace(tables[0], slots=slots)
    return tuple(with_slots if place.has_slots else tables[place.table] for place in places)


def _index_of(pools: Sequence[CachePool], window: int | None) -> int | None:
    """Of the pool with that window, or that keeps every token; None: there is none."""
    for index, pool in enumerate(pools):
        if pool.kind is not CacheKind.STATE and pool.window == window:
            return index
    return None
