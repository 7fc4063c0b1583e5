"""The host's memory of a rank, and the copies between it and the pools in which steps compute.

On a device that runs ahead of the host, what comes back is copied layer by layer in a queue of its
own, while the step computes: each layer waits for its own part only (`ArrivingCaches`). A CPU has
no second unit that could copy meanwhile, so all its threads copy, and then they compute."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood.distributed.transfer.segment import OwnSegment
from sapwood.kernels.transfer import CopyQueue, copy_queue, runs_ahead
from sapwood.memory.buffers import page_rows
from sapwood.memory.tiers.rates import Rate
from sapwood.schema.cache import CacheGroup, pools_of
from sapwood.schema.step import CopiedPage, StepPlan

T = TypeVar("T")
Numbers = tuple[list[int], list[int]]


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


class CarryRows(Protocol):
    """As Kernels.carry_rows."""

    def __call__(
        self, source: Tensor, target: Tensor, from_rows: Sequence[int], to_rows: Sequence[int], /
    ) -> None: ...


class ArrivingCaches(Sequence[tuple[Tensor, ...]]):
    """The caches of all layers. Whoever takes those of a layer waits, on the device, until what
    comes back into them is there."""

    def __init__(self, caches: Sequence[tuple[Tensor, ...]]) -> None:
        self._caches = caches
        self._arriving: dict[int, Callable[[], None]] = {}

    @overload
    def __getitem__(self, layer: int) -> tuple[Tensor, ...]: ...

    @overload
    def __getitem__(self, layer: slice) -> Sequence[tuple[Tensor, ...]]: ...

    def __getitem__(self, layer: int | slice) -> tuple[Tensor, ...] | Sequence[tuple[Tensor, ...]]:
        if isinstance(layer, slice):
            return [self[at] for at in range(*layer.indices(len(self)))]
        wait = self._arriving.pop(layer, None)
        if wait is not None:
            wait()
        return self._caches[layer]

    def __len__(self) -> int:
        return len(self._caches)

    def expect(self, layer: int, wait: Callable[[], None]) -> None:
        """The layer's caches may be read after `wait`."""
        self._arriving[layer] = wait

    def wait(self) -> None:
        """Wait for all layers."""
        for wait in self._arriving.values():
            wait()
        self._arriving.clear()


def awaited(
    device: torch.device, caches: Sequence[tuple[Tensor, ...]]
) -> Sequence[tuple[Tensor, ...]]:
    """The caches of a model's layers as the layers shall read them."""
    return ArrivingCaches(caches) if runs_ahead(device) else caches


def copied_beside(
    device: torch.device, arriving: Sequence[tuple[Tensor, ...]]
) -> tuple[CopyQueue, ArrivingCaches] | None:
    """What copies beside steps on that device; None: nothing does.

    arriving  the caches that the model's layers read"""
    queue = copy_queue(device)
    if queue is None or not isinstance(arriving, ArrivingCaches):
        return None
    return queue, arriving


class PageCopies:
    """Carries out the copies of plans: each before its step, or beside it in a queue."""

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        caches: Sequence[tuple[Tensor, ...]],
        host_sizes: Sequence[int],
        carry_rows: CarryRows,
        *,
        is_shared: bool = False,
        beside: tuple[CopyQueue, ArrivingCaches] | None = None,
    ) -> None:
        """groups      as `allocate_caches` takes them
        caches      what it returned
        host_sizes  slots of each pool
        is_shared   whether other processes of this user may write to the host's memory
        beside      copies what comes back while a step computes; the caches that its layers read

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
        self._carry_rows = carry_rows
        self._beside = beside
        self._layers = layers_by_pool(groups, caches, device)
        self._timed: deque[tuple[int, Callable[[], float | None]]] = deque()
        """Bytes that were queued, and how long they took."""

    def before(self, run: Callable[[StepPlan], T]) -> Callable[[StepPlan], T]:
        """`run`, after the copies of its plan have been made or queued."""

        def copied(plan: StepPlan) -> T:
            if self._beside is not None:
                self._beside[1].wait()
            if plan.saves or plan.loads:
                self._copy(plan)
            return run(plan)

        return copied

    @torch.inference_mode()
    def _copy(self, plan: StepPlan) -> None:
        for at, numbers in _by_pool(plan.saves):
            pool = self.pools[at]
            for host, device in zip(pool.host, pool.device, strict=True):
                self._carry_rows(device, host, *numbers)
        start_s = time.perf_counter()
        loads = list(_by_pool(plan.loads))
        if self._beside is not None and loads:
            self._load_beside(plan, loads, *self._beside)
            return
        num_bytes = 0
        for at, numbers in loads:
            pool = self.pools[at]
            for host, device in zip(pool.host, pool.device, strict=True):
                self._carry_rows(host, device, *numbers)
            num_bytes += pool.page_bytes * len(numbers[0])
        self.loading.add(num_bytes, time.perf_counter() - start_s)

    def _load_beside(
        self,
        plan: StepPlan,
        loads: Sequence[tuple[int, Numbers]],
        queue: CopyQueue,
        arriving: ArrivingCaches,
    ) -> None:
        """Queue the copies layer by layer."""
        self._tell_times()
        queue.follow()
        stop = queue.stopwatch()
        waits: dict[int, Callable[[], None]] = {}
        with queue.used():
            for layer in sorted({layer for at, _ in loads for layer in self._layers[at]}):
                for at, numbers in loads:
                    pool = self.pools[at]
                    for piece, columns in self._layers[at].get(layer, ()):
                        host, device = pool.host[piece], pool.device[piece]
                        self._carry_rows(host[:, columns], device[:, columns], *numbers)
                waits[layer] = queue.mark()
        num_bytes = sum(self.pools[at].page_bytes * len(read) for at, (read, _) in loads)
        self._timed.append((num_bytes, stop()))
        # A captured step of decodes reads its memory without asking for it.
        is_captured = all(entry.num_new == 1 for entry in plan.scheduled)
        for layer, wait in waits.items():
            if is_captured or layer >= len(arriving):
                wait()
            else:
                arriving.expect(layer, wait)

    def _tell_times(self) -> None:
        while self._timed:
            num_bytes, taken = self._timed[0]
            seconds = taken()
            if seconds is None:
                return
            self.loading.add(num_bytes, seconds)
            self._timed.popleft()


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


def layers_by_pool(
    groups: Sequence[CacheGroup],
    caches: Sequence[tuple[Tensor, ...]],
    pieces: Sequence[Sequence[Tensor]],
) -> list[dict[int, list[tuple[int, slice]]]]:
    """Per pool, by layer: where in a page or slot its bytes are, as (piece, columns).

    pieces  what `rows_by_pool` returned"""
    found = []
    for pool, rows in zip(pools_of(groups), pieces, strict=True):
        starts = {piece.data_ptr(): at for at, piece in enumerate(rows)}
        of_pool: dict[int, list[tuple[int, slice]]] = {}
        for layer in (layer for at in pool.groups for layer in groups[at].layers):
            for tensor in caches[layer]:
                start = max(address for address in starts if address <= tensor.data_ptr())
                first = tensor.data_ptr() - start
                columns = slice(first, first + tensor[0].nbytes)
                of_pool.setdefault(layer, []).append((starts[start], columns))
        found.append({layer: _joined(parts) for layer, parts in of_pool.items()})
    return found


def _joined(parts: Sequence[tuple[int, slice]]) -> list[tuple[int, slice]]:
    """The same columns, neighbours as one stretch."""
    joined: list[tuple[int, slice]] = []
    for piece, columns in sorted(parts, key=lambda part: (part[0], part[1].start)):
        if joined and joined[-1][0] == piece and joined[-1][1].stop == columns.start:
            columns = slice(joined.pop()[1].start, columns.stop)
        joined.append((piece, columns))
    return joined


def _by_pool(copies: Sequence[CopiedPage]) -> Iterator[tuple[int, Numbers]]:
    """Per pool: the numbers that are read, and those that are written."""
    for at in sorted({copy.pool for copy in copies}):
        own = [copy for copy in copies if copy.pool == at]
        yield at, ([copy.source for copy in own], [copy.target for copy in own])


def _on_cpu(pieces: Sequence[Tensor]) -> bool:
    return all(rows.device.type == "cpu" for rows in pieces)


def _host_pool(device: Sequence[Tensor], num_slots: int, rows: Tensor | None) -> HostPool:
    """rows: memory for the slots; None: it is allocated"""
    widths = [piece.shape[1] for piece in device]
    if rows is None:
        pinned = not _on_cpu(device)
        rows = torch.empty((num_slots, sum(widths)), dtype=torch.uint8, pin_memory=pinned)
    return HostPool(tuple(device), torch.split(rows, widths, dim=1) if widths else (), rows)
