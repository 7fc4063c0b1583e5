"""The host's memory of a rank, and the copies between it and the pools in which steps compute."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood.distributed.transfer.segment import OwnSegment
from sapwood.memory.buffers import page_rows
from sapwood.memory.tiers.rates import Rate
from sapwood.schema.cache import CacheGroup, pools_of
from sapwood.schema.step import StepPlan

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HostPool:
    """A pool's memory on both sides, by pieces: in each, a page or a state is one row of bytes.

    device  [pages, bytes of a page in the piece], uint8
    host    [slots, the same], views of `rows`
    rows    [slots, bytes of a page in all pieces]
    """

    device: tuple[Tensor, ...]
    host: tuple[Tensor, ...]
    rows: Tensor

    @property
    def page_bytes(self) -> int:
        """Of one page or state, in all pieces."""
        return self.rows.shape[1]


class PageCopies:
    """Carries out the copies of plans, each before its step."""

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        caches: Sequence[tuple[Tensor, ...]],
        host_sizes: Sequence[int],
        *,
        is_shared: bool = False,
    ) -> None:
        """groups      as `allocate_caches` takes them
        caches      what it returned
        host_sizes  slots of each pool
        is_shared   whether other processes of this user may write to the host's memory

        Raises OSError if the system has no memory that can be shared"""
        device = rows_by_pool(groups, caches)
        shapes = [
            (size, sum(rows.shape[1] for rows in pieces))
            for size, pieces in zip(host_sizes, device, strict=True)
        ]
        self.segment = OwnSegment(shapes) if is_shared else None
        shared = None if self.segment is None else self.segment.rows
        self.pools = tuple(
            _host_pool(pieces, size, None if shared is None else torch.from_numpy(shared[at]))
            for at, (pieces, size) in enumerate(zip(device, host_sizes, strict=True))
        )
        self.loading = Rate()
        """Seconds per byte that comes back."""

    def before(self, run: Callable[[StepPlan], T]) -> Callable[[StepPlan], T]:
        """`run`, after the copies of its plan."""

        def copied(plan: StepPlan) -> T:
            if plan.saves or plan.loads:
                self._copy(plan)
            return run(plan)

        return copied

    @torch.inference_mode()
    def _copy(self, plan: StepPlan) -> None:
        for save in plan.saves:
            pool = self.pools[save.pool]
            for host, device in zip(pool.host, pool.device, strict=True):
                host[save.target].copy_(device[save.source])
        start_s, num_bytes = time.perf_counter(), 0
        for load in plan.loads:
            pool = self.pools[load.pool]
            for host, device in zip(pool.host, pool.device, strict=True):
                device[load.target].copy_(host[load.source])
            num_bytes += pool.page_bytes
        self.loading.add(num_bytes, time.perf_counter() - start_s)


class PageMemory:
    """The pools in which steps compute, for whoever sends pages elsewhere."""

    def __init__(self, groups: Sequence[CacheGroup], caches: Sequence[tuple[Tensor, ...]]) -> None:
        """As `PageCopies` takes them."""
        self._pools = rows_by_pool(groups, caches)
        self._arrays = [
            [rows.numpy() for rows in pieces] for pieces in self._pools if _on_cpu(pieces)
        ]

    @property
    def row_bytes(self) -> tuple[int, ...]:
        """Per pool: of a page or state, in all pieces."""
        return tuple(sum(rows.shape[1] for rows in pieces) for pieces in self._pools)

    def read(self, pool: int, number: int) -> list[NDArray[np.uint8]]:
        """A page's bytes, by pieces: on a CPU where they lie, else copied."""
        if self._arrays:
            return [rows[number] for rows in self._arrays[pool]]
        return [rows[number].cpu().numpy() for rows in self._pools[pool]]


def rows_by_pool(
    groups: Sequence[CacheGroup], caches: Sequence[tuple[Tensor, ...]]
) -> list[list[Tensor]]:
    """Per pool as `page_rows`."""
    return [
        page_rows([caches[layer] for at in pool.groups for layer in groups[at].layers])
        for pool in pools_of(groups)
    ]


def _on_cpu(pieces: Sequence[Tensor]) -> bool:
    return all(rows.device.type == "cpu" for rows in pieces)


def _host_pool(device: Sequence[Tensor], num_slots: int, rows: Tensor | None) -> HostPool:
    """rows: memory for the slots; None: it is allocated"""
    widths = [piece.shape[1] for piece in device]
    if rows is None:
        pinned = not _on_cpu(device)
        rows = torch.empty((num_slots, sum(widths)), dtype=torch.uint8, pin_memory=pinned)
    return HostPool(tuple(device), torch.split(rows, widths, dim=1) if widths else (), rows)
