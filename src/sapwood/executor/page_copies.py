"""The host's memory of a rank, and the copies between it and the pools in which steps compute."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

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
    ) -> None:
        """groups      as `allocate_caches` takes them
        caches      what it returned
        host_sizes  slots of each pool"""
        self.pools = tuple(
            _host_pool([caches[layer] for at in pool.groups for layer in groups[at].layers], size)
            for pool, size in zip(pools_of(groups), host_sizes, strict=True)
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


def _host_pool(caches: Sequence[tuple[Tensor, ...]], num_slots: int) -> HostPool:
    device = tuple(page_rows(caches))
    on_gpu = any(rows.device.type != "cpu" for rows in device)
    widths = [rows.shape[1] for rows in device]
    rows = torch.empty((num_slots, sum(widths)), dtype=torch.uint8, pin_memory=on_gpu)
    return HostPool(device, torch.split(rows, widths, dim=1) if widths else (), rows)
