"""The storage tier as the engine's loop sees it: copies that are written, and read ahead of need.

What the host gets is also written to the storage, by a thread, once the plan that copies it was
executed. A request that arrives has its pages looked for there by another thread, and read into
slots of the host, where they are found when the request is admitted. A slot that a thread uses is
pinned. Whatever fails is a miss: said once, counted, and computed again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sapwood.base.clock import Clock
from sapwood.memory.listener import Stretch
from sapwood.memory.namespace import MEDIUM, branches_of
from sapwood.memory.needs import Needs
from sapwood.memory.prefix_tree import first_needed_page
from sapwood.memory.storage.interface import PageStorage, StorageUnavailable
from sapwood.memory.storage.names import CopyNames
from sapwood.memory.storage.worker import StorageWorker
from sapwood.memory.tiers.host import HostTier
from sapwood.memory.tiers.rates import CostRule
from sapwood.memory.tiers.slots import PageCopy
from sapwood.schema.config.tiers import PrefetchRules

log = logging.getLogger(__name__)

BATCH_PAGES = 128
READ_PAGES = 32
"""Of one call; a request that leaves ends its prefetch between two."""
REST_S = 30.0
"""After a failure the storage is left alone for so long."""
CLOSE_S = 2.0


@dataclass(slots=True)
class Prefetch:
    """Pages that are looked for, for one waiting request.

    begin     the first page that is neither on the device nor on the host
    until_s   when the request stops waiting
    is_over   whether nothing more will come
    """

    digests: Sequence[bytes]
    begin: int
    until_s: float
    is_over: bool = False
    num_reads: int = 0


@dataclass(slots=True, eq=False)
class _Saved:
    pool: int
    name: str
    copy: PageCopy


@dataclass(slots=True)
class StoredCounts:
    """Pages and states that were written and read, and those that were not because of a failure or
    for want of time or slots."""

    num_written: int = 0
    num_read: int = 0
    num_missed: int = 0
    num_unwritten: int = 0
    num_failures: int = 0
    bytes_written: int = 0
    bytes_read: int = 0
    read_s: float = 0.0
    write_s: float = 0.0


@dataclass(slots=True)
class _Attached:
    """A storage in use. Threads hold on to theirs when another takes its place."""

    storage: PageStorage
    backend: str
    reader: StorageWorker = field(default_factory=lambda: StorageWorker("kv-reads"))
    writer: StorageWorker = field(default_factory=lambda: StorageWorker("kv-writes"))


class StoredPages:
    """Writes the host's copies to a storage, and reads them back for requests that wait."""

    def __init__(
        self,
        host: HostTier,
        needs: Needs,
        rows: Sequence[NDArray[np.uint8]],
        clock: Clock,
        cost: CostRule,
        names: CopyNames,
        rules: PrefetchRules,
        *,
        is_shared: Callable[[str], bool],
    ) -> None:
        """rows       per pool: the host's slots, [slots, bytes of a page]
        is_shared  whether other engines compute the same in a namespace of that name"""
        self._host = host
        self._needs = needs
        self._rows = rows
        self._clock = clock
        self._cost = cost
        self._names = names
        self.rules = rules
        self._is_shared = is_shared
        self._attached: _Attached | None = None
        self._is_mixed = False
        self._new: list[_Saved] = []
        self._awaiting: dict[int, list[_Saved]] = {}
        self._prefetches: dict[str, Prefetch] = {}
        self._rests_until_s = {"read": 0.0, "written": 0.0}
        self._num_pinned = [0] * len(rows)
        self.counts = StoredCounts()
        host.on_saved = self._saved

    # ---- attaching -----------------------------------------------------------------------------

    @property
    def is_attached(self) -> bool:
        return self._attached is not None

    @property
    def backend(self) -> str | None:
        return None if self._attached is None else self._attached.backend

    def attach(self, storage: PageStorage, backend: str) -> None:
        """backend  its name"""
        assert self._attached is None, "one storage at a time"
        self._attached = _Attached(storage, backend)
        self._rests_until_s = {"read": 0.0, "written": 0.0}

    def detach(self) -> None:
        """Write what waits, as long as that is quick, and use the storage no longer."""
        attached, self._attached = self._attached, None
        if attached is None:
            return
        for prefetch in self._prefetches.values():
            prefetch.is_over = True
        self._prefetches.clear()
        for worker in (attached.reader, attached.writer):
            worker.close(CLOSE_S)
            worker.finish()
        attached.storage.close()

    def clear_storage(self) -> None:
        """StorageUnavailable if it cannot be."""
        if self._attached is not None:
            self._attached.storage.clear()

    def forget(self) -> None:
        """The host's copies were forgotten."""
        for saved in [*self._new, *(one for step in self._awaiting.values() for one in step)]:
            self._unpin(saved.pool, saved.copy)
        self._new = []
        self._awaiting.clear()
        for prefetch in self._prefetches.values():
            prefetch.is_over = True
        self._prefetches.clear()
        self._is_mixed = False

    def weights_changed(self) -> None:
        """Pages have other names from now on. None travels until `forget`: what the tree and the
        host have may be of the weights before."""
        self._names.renew()
        self._is_mixed = True

    def poll(self) -> None:
        """Take in what the threads have done. To be called once per turn."""
        if self._attached is not None:
            self._attached.reader.finish()
            self._attached.writer.finish()

    @property
    def is_busy(self) -> bool:
        """Whether threads are at work."""
        attached = self._attached
        return attached is not None and bool(attached.reader.num_open + attached.writer.num_open)

    # ---- writing -------------------------------------------------------------------------------

    def _saved(self, stretch: Stretch, copies: Sequence[tuple[bytes, PageCopy]]) -> None:
        """The next plan copies these pages to the host, the last one first."""
        attached, pool = self._attached, stretch.pool
        if attached is None or not copies or not self._may_travel(stretch):
            return
        most = len(self._rows[pool]) // 2
        for digest, copy in reversed(copies):
            if self._num_pinned[pool] >= most:
                self.counts.num_unwritten += 1
                continue
            self._pin(pool, copy)
            self._new.append(_Saved(pool, self._names.of(pool, digest), copy))

    def _may_travel(self, stretch: Stretch) -> bool:
        """Whether the namespace means the same to other engines."""
        if self._is_mixed:
            return False
        root, marks = stretch.names
        return self._is_shared(root) and all(name.startswith(MEDIUM) for name in branches_of(marks))

    def planned(self, step: int) -> None:
        """That plan makes the copies that were told of since the last one."""
        if self._new:
            self._awaiting[step], self._new = self._new, []

    def executed(self, step: int) -> None:
        """The copies of that plan are made."""
        saved = self._awaiting.pop(step, None)
        if not saved:
            return
        for at in range(0, len(saved), BATCH_PAGES):
            self._write(saved[at : at + BATCH_PAGES])

    def _write(self, batch: list[_Saved]) -> None:
        attached = self._attached
        if attached is None or self._rests("written"):
            self._let_go(batch)
            self.counts.num_unwritten += len(batch)
            return
        names = [saved.name for saved in batch]
        views = [self._view(saved.pool, saved.copy) for saved in batch]
        storage = attached.storage

        def call() -> tuple[int, float]:
            start_s = time.perf_counter()
            return storage.batch_set(names, views), time.perf_counter() - start_s

        def then(done: tuple[int, float]) -> None:
            self._let_go(batch)
            self.counts.num_written += done[0]
            self.counts.num_unwritten += len(batch) - done[0]
            self.counts.bytes_written += sum(map(len, views[: done[0]]))
            self.counts.write_s += done[1]

        def fail(error: Exception) -> None:
            self._let_go(batch)
            self.counts.num_unwritten += len(batch)
            self._failed("written", error)

        attached.writer.do(call, then, fail)

    def _let_go(self, batch: list[_Saved]) -> None:
        for saved in batch:
            self._unpin(saved.pool, saved.copy)

    # ---- reading -------------------------------------------------------------------------------

    def begin(self, request_id: str, digests: Sequence[bytes], begin: int, page_size: int) -> None:
        """Look for the pages from `begin` on of a request that has arrived."""
        attached = self._attached
        num_tokens = (len(digests) - begin) * page_size
        if (
            attached is None
            or self._is_mixed
            or num_tokens < self.rules.threshold
            or self._rests("read")
        ):
            return
        num_bytes = sum(rows.shape[1] for rows in self._rows) * (len(digests) - begin)
        if not self._cost.pays(num_bytes, num_tokens):
            return
        wait_s = self.rules.wait_s(num_tokens)
        prefetch = Prefetch(digests, begin, self._clock.now_s() + wait_s)
        self._prefetches[request_id] = prefetch

        def fail(error: Exception) -> None:
            prefetch.is_over = True
            self._failed("read", error)

        attached.reader.do(
            lambda: self._find(attached, prefetch, page_size),
            lambda found: self._read(attached, prefetch, found),
            fail,
        )

    def holds(self, request_id: str) -> bool:
        """Whether the request waits for its pages."""
        prefetch = self._prefetches.get(request_id)
        return (
            prefetch is not None and not prefetch.is_over and self._clock.now_s() < prefetch.until_s
        )

    @property
    def num_held(self) -> int:
        """Requests that wait for their pages."""
        return sum(map(self.holds, self._prefetches))

    def leave(self, request_id: str) -> None:
        """The request waits no longer, for whatever reason."""
        prefetch = self._prefetches.pop(request_id, None)
        if prefetch is not None:
            prefetch.is_over = True

    def _find(
        self, attached: _Attached, prefetch: Prefetch, page_size: int
    ) -> list[tuple[int, bytes]]:
        """(pool, digest) of all that the longest prefix in the storage needs. In a thread."""
        needs, digests, begin = self._needs, prefetch.digests, prefetch.begin

        def count(pool: int, wanted: Sequence[bytes]) -> int:
            names = [self._names.of(pool, digest) for digest in wanted]
            found = 0
            for at in range(0, len(names), BATCH_PAGES):
                batch = names[at : at + BATCH_PAGES]
                number = attached.storage.batch_exists(batch)
                found += number
                if number < len(batch) or prefetch.is_over:
                    break
            return found

        end = len(digests)
        if needs.full is not None:
            end = begin + count(needs.full, digests[begin:])
        while end > begin:
            firsts = [(needs.state, end - 1)] if needs.state is not None else []
            firsts += [
                (pool, max(begin, first_needed_page(window, end * page_size, page_size)))
                for pool, window in needs.windows
            ]
            lacks = any(count(pool, digests[first:end]) < end - first for pool, first in firsts)
            if not lacks or prefetch.is_over:
                pages = [] if needs.full is None else [(needs.full, begin)]
                return [
                    (pool, digest)
                    for pool, first in pages + firsts
                    for digest in digests[first:end]
                ]
            end -= 1
        return []

    def _read(
        self, attached: _Attached, prefetch: Prefetch, found: list[tuple[int, bytes]]
    ) -> None:
        """Give the pages that were found slots of the host, and have them read into these."""
        wanted: list[tuple[int, bytes, PageCopy]] = []
        for pool, digest in [] if prefetch.is_over else found:
            slots = self._host.slots[pool]
            if slots.find(digest) is not None or self._num_pinned[pool] >= slots.num_slots // 2:
                continue
            copy = slots.add(digest)
            if copy is None:
                continue
            copy.is_filled, copy.was_stored = False, True
            self._pin(pool, copy)
            wanted.append((pool, digest, copy))
        batches = [wanted[at : at + READ_PAGES] for at in range(0, len(wanted), READ_PAGES)]
        prefetch.num_reads = len(batches)
        prefetch.is_over |= not batches
        for batch in batches:
            self._read_batch(attached, prefetch, batch)

    def _read_batch(
        self, attached: _Attached, prefetch: Prefetch, batch: list[tuple[int, bytes, PageCopy]]
    ) -> None:
        names = [self._names.of(pool, digest) for pool, digest, _ in batch]
        views = [self._view(pool, copy) for pool, _, copy in batch]

        def call() -> tuple[int, float]:
            start_s = time.perf_counter()
            count = 0 if prefetch.is_over else attached.storage.batch_get(names, views)
            return count, time.perf_counter() - start_s

        def then(done: tuple[int, float]) -> None:
            count, took_s = done
            for at, (pool, digest, copy) in enumerate(batch):
                self._settle(pool, digest, copy, is_filled=at < count)
            num_bytes = sum(map(len, views[:count]))
            self.counts.num_read += count
            self.counts.num_missed += len(batch) - count
            self.counts.bytes_read += num_bytes
            self.counts.read_s += took_s
            self._cost.byte.add(num_bytes, took_s)
            prefetch.num_reads -= 1
            # A page is of no use without the one before.
            prefetch.is_over |= count < len(batch) or not prefetch.num_reads

        def fail(error: Exception) -> None:
            for pool, digest, copy in batch:
                self._settle(pool, digest, copy, is_filled=False)
            prefetch.num_reads -= 1
            prefetch.is_over = True
            self._failed("read", error)

        attached.reader.do(call, then, fail)

    def _settle(self, pool: int, digest: bytes, copy: PageCopy, *, is_filled: bool) -> None:
        copy.is_filled = is_filled
        slots = self._host.slots[pool]
        if not is_filled and slots.find(digest) is copy:
            slots.drop(digest)
        self._unpin(pool, copy)

    # ---- both ----------------------------------------------------------------------------------

    def _view(self, pool: int, copy: PageCopy) -> memoryview:
        return memoryview(self._rows[pool][copy.slot])

    def _pin(self, pool: int, copy: PageCopy) -> None:
        self._num_pinned[pool] += 1
        self._host.slots[pool].pin(copy)

    def _unpin(self, pool: int, copy: PageCopy) -> None:
        self._num_pinned[pool] -= 1
        self._host.slots[pool].unpin(copy)

    def _rests(self, what: str) -> bool:
        return self._clock.now_s() < self._rests_until_s[what]

    def _failed(self, what: str, error: Exception) -> None:
        """Leave the storage alone for a while; say it once for that time."""
        self.counts.num_failures += 1
        if self._rests(what):
            return
        self._rests_until_s[what] = self._clock.now_s() + REST_S
        known = isinstance(error, StorageUnavailable)
        log.warning(
            "no pages are %s for %.0f s: %s",
            "read from the storage tier" if what == "read" else "written to the storage tier",
            REST_S,
            error if known else f"{type(error).__name__}: {error}",
        )
