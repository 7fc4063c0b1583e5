"""The storage tier as the engine's loop sees it: copies that are written, and read ahead of need.

What the host gets is also written to the storage, by a thread, once the plan that copies it was
executed. A request that arrives has its pages looked for there by another thread, and read into
slots of the host, where they are found when the request is admitted. A slot that a thread uses is
pinned. Whatever fails is a miss: said once, counted, and computed again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sapwood.base.clock import Clock
from sapwood.engine.shared_names import SharedNames
from sapwood.memory.kv_events import KVEventSource
from sapwood.memory.listener import Stretch
from sapwood.memory.namespace import Namespace, branches_of
from sapwood.memory.needs import Needs
from sapwood.memory.prefix_tree import first_needed_page
from sapwood.memory.storage.interface import StorageUnavailable
from sapwood.memory.storage.names import CopyNames
from sapwood.memory.storage.parts import PageParts, Place
from sapwood.memory.storage.worker import StorageWorker
from sapwood.memory.tiers.host import Copies, HostTier
from sapwood.memory.tiers.rates import CostRule
from sapwood.memory.tiers.slots import PageCopy
from sapwood.schema.config.tiers import PrefetchRules
from sapwood.schema.kv_events import HOST_TIER, STORAGE_TIER, BlockStored

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

    namespace, key  of the request's prompt
    digests   of its pages, as the host has them
    names     the same, as the storage has them
    begin     the first page that is neither on the device nor on the host
    until_s   when the request stops waiting
    is_over   whether nothing more will come
    """

    namespace: Namespace
    key: bytes
    digests: Sequence[bytes]
    names: Sequence[bytes]
    begin: int
    until_s: float
    is_over: bool = False
    num_reads: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Page:
    """A page, or a state, on its way between a slot of the host and the storage.

    digest  as the host has it
    told    what KV events say of it; None: nothing
    """

    pool: int
    digest: bytes
    name: str
    copy: PageCopy
    told: BlockStored | None = None

    @property
    def place(self) -> Place:
        return Place(self.name, self.pool, self.copy.slot)


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
    """A storage in use."""

    backend: str
    reader: StorageWorker
    writer: StorageWorker


class StoredPages:
    """Writes the host's copies to a storage, and reads them back for requests that wait."""

    def __init__(
        self,
        host: HostTier,
        needs: Needs,
        parts: PageParts,
        clock: Clock,
        cost: CostRule,
        names: CopyNames,
        rules: PrefetchRules,
        shared: SharedNames,
        *,
        events: KVEventSource | None = None,
        worker: Callable[[str], StorageWorker] = StorageWorker,
    ) -> None:
        """parts   the storage, as all ranks use it
        shared  what namespaces are called there
        events  tells others what the host and the storage have
        worker  makes what calls the storage, by its name"""
        self._host = host
        self._needs = needs
        self._parts = parts
        self._page_bytes = list(parts.page_bytes)
        self._clock = clock
        self._cost = cost
        self._names = names
        self.rules = rules
        self._shared = shared
        self._events = events
        self._worker = worker
        self._attached: _Attached | None = None
        self._is_mixed = False
        self._leaving: list[StorageWorker] = []
        """Workers of a storage that was detached while they were in the middle of a call."""
        self._new: list[_Page] = []
        self._awaiting: dict[int, list[_Page]] = {}
        self._prefetches: dict[str, Prefetch] = {}
        self._rests_until_s = {"read": 0.0, "written": 0.0}
        self._num_pinned = [0] * len(self._page_bytes)
        self.counts = StoredCounts()
        host.listeners.append(self)

    # ---- attaching -----------------------------------------------------------------------------

    @property
    def is_attached(self) -> bool:
        return self._attached is not None

    @property
    def backend(self) -> str | None:
        return None if self._attached is None else self._attached.backend

    def attach(self, backend: str, extra: Mapping[str, Any]) -> None:
        """Use the storage of that name from now on; ConfigError if it cannot be."""
        assert self._attached is None, "one storage at a time"
        self._parts.open(backend, extra)
        self._attached = _Attached(backend, self._worker("kv-reads"), self._worker("kv-writes"))
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
            if worker.num_open:
                self._leaving.append(worker)
        self._parts.close()

    def clear_storage(self) -> None:
        """StorageUnavailable if it cannot be."""
        if self._attached is not None:
            self._parts.clear()
            if self._events is not None:
                self._events.tier_emptied(STORAGE_TIER)

    def forget(self) -> None:
        """The host's copies were forgotten."""
        self._let_go([*self._new, *(one for step in self._awaiting.values() for one in step)])
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
        for worker in self._workers:
            worker.finish()
        self._leaving = [worker for worker in self._leaving if worker.num_open]

    @property
    def is_busy(self) -> bool:
        """Whether threads are at work."""
        return any(worker.num_open for worker in self._workers)

    @property
    def _workers(self) -> list[StorageWorker]:
        attached = self._attached
        return self._leaving + ([] if attached is None else [attached.reader, attached.writer])

    # ---- writing -------------------------------------------------------------------------------

    def saved(self, stretch: Stretch, copies: Copies) -> None:
        """As HostListener says."""
        pool = stretch.pool
        if self._attached is None or self._is_mixed:
            return
        names = self._names_of(stretch)
        if names is None:
            return
        most = self._host.slots[pool].num_slots // 2
        told = {} if self._events is None else self._events.pages_of(stretch)
        for digest, copy in reversed(copies):
            if self._num_pinned[pool] >= most:
                self.counts.num_unwritten += 1
                continue
            self._pin(pool, copy)
            name = self._names.of(pool, names[digest])
            self._new.append(_Page(pool, digest, name, copy, told.get(digest)))

    def dropped(self, pool: int, digest: bytes) -> None:
        pass  # the storage keeps its own

    def _names_of(self, stretch: Stretch) -> dict[bytes, bytes] | None:
        """By the digest of each of these pages: the one that other engines have for it. None: the
        namespace means nothing to them."""
        root, marks = stretch.names
        shared = self._shared.root(root)
        branches = {name: self._shared.branch(name) for name in branches_of(marks)}
        if shared is None or None in branches.values():
            return None
        digests = stretch.digests
        if shared == root and all(name == other for name, other in branches.items()):
            return dict(zip(digests, digests, strict=True))
        renamed = stretch.digests_under(shared, lambda name: branches[name] or name)
        return dict(zip(digests, renamed, strict=True))

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

    def _write(self, batch: list[_Page]) -> None:
        attached = self._attached
        if attached is None or self._rests("written"):
            self._let_go(batch)
            self.counts.num_unwritten += len(batch)
            return
        places = [page.place for page in batch]

        def call() -> tuple[int, float]:
            start_s = time.perf_counter()
            return self._parts.write(places), time.perf_counter() - start_s

        def then(done: tuple[int, float]) -> None:
            count, took_s = done
            self._let_go(batch)
            self._tell(STORAGE_TIER, batch[:count])
            self.counts.num_written += count
            self.counts.num_unwritten += len(batch) - count
            self.counts.bytes_written += self._num_bytes(batch[:count])
            self.counts.write_s += took_s

        def fail(error: Exception) -> None:
            self._let_go(batch)
            self.counts.num_unwritten += len(batch)
            self._failed("written", error)

        attached.writer.do(call, then, fail)

    def _let_go(self, batch: list[_Page]) -> None:
        for page in batch:
            self._unpin(page.pool, page.copy)

    def _tell(self, medium: str, pages: Sequence[_Page]) -> None:
        """A tier has these pages from now on."""
        if self._events is not None:
            for page in pages:
                if page.told is not None:
                    self._events.tier_has(medium, page.told)

    def _num_bytes(self, batch: Sequence[_Page]) -> int:
        """On rank 0."""
        return sum(self._page_bytes[page.pool] for page in batch)

    # ---- reading -------------------------------------------------------------------------------

    def names_in(self, namespace: Namespace) -> Namespace | None:
        """What the storage calls a namespace; None: it has nothing of that."""
        return self._shared.of(namespace)

    def begin(
        self,
        request_id: str,
        namespace: Namespace,
        key: bytes,
        digests: Sequence[bytes],
        names: Sequence[bytes],
        begin: int,
        page_size: int,
    ) -> None:
        """Look for the pages from `begin` on of a request that has arrived.

        names  the digests under the name that the namespace has in the storage"""
        attached = self._attached
        num_tokens = (len(digests) - begin) * page_size
        if (
            attached is None
            or self._is_mixed
            or num_tokens < self.rules.threshold
            or self._rests("read")
        ):
            return
        num_bytes = sum(self._page_bytes) * (len(digests) - begin)
        if not self._cost.pays(num_bytes, num_tokens):
            return
        wait_s = self.rules.wait_s(num_tokens)
        until_s = self._clock.now_s() + wait_s
        prefetch = Prefetch(namespace, key, digests, names, begin, until_s)
        self._prefetches[request_id] = prefetch

        def fail(error: Exception) -> None:
            prefetch.is_over = True
            self._failed("read", error)

        attached.reader.do(
            lambda: self._find(prefetch, page_size),
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

    def _find(self, prefetch: Prefetch, page_size: int) -> list[tuple[int, int]]:
        """(pool, index of the page) of all that the longest prefix in the storage needs. In a
        thread."""
        needs, begin = self._needs, prefetch.begin

        def count(pool: int, first: int, end: int) -> int:
            names = [self._names.of(pool, name) for name in prefetch.names[first:end]]
            found = 0
            for at in range(0, len(names), BATCH_PAGES):
                batch = names[at : at + BATCH_PAGES]
                number = self._parts.count(batch)
                found += number
                if number < len(batch) or prefetch.is_over:
                    break
            return found

        end = len(prefetch.digests)
        if needs.full is not None:
            end = begin + count(needs.full, begin, end)
        while end > begin:
            firsts = [(needs.state, end - 1)] if needs.state is not None else []
            firsts += [
                (pool, max(begin, first_needed_page(window, end * page_size, page_size)))
                for pool, window in needs.windows
            ]
            lacks = any(count(pool, first, end) < end - first for pool, first in firsts)
            if not lacks or prefetch.is_over:
                pages = [] if needs.full is None else [(needs.full, begin)]
                return [
                    (pool, index) for pool, first in pages + firsts for index in range(first, end)
                ]
            end -= 1
        return []

    def _read(self, attached: _Attached, prefetch: Prefetch, found: list[tuple[int, int]]) -> None:
        """Give the pages that were found slots of the host, and have them read into these."""
        wanted: list[_Page] = []
        if self._is_mixed or attached is not self._attached:
            prefetch.is_over = True
        for pool, index in [] if prefetch.is_over else found:
            slots, digest = self._host.slots[pool], prefetch.digests[index]
            if slots.find(digest) is not None or self._num_pinned[pool] >= slots.num_slots // 2:
                continue
            copy = slots.add(digest)
            if copy is None:
                continue
            copy.is_filled, copy.was_stored = False, True
            self._pin(pool, copy)
            name = self._names.of(pool, prefetch.names[index])
            told = None
            if self._events is not None:
                told = self._events.page_of_prompt(
                    pool, prefetch.namespace, prefetch.key, prefetch.digests, index
                )
            wanted.append(_Page(pool, digest, name, copy, told))
        batches = [wanted[at : at + READ_PAGES] for at in range(0, len(wanted), READ_PAGES)]
        prefetch.num_reads = len(batches)
        prefetch.is_over |= not batches
        for batch in batches:
            self._read_batch(attached, prefetch, batch)

    def _read_batch(self, attached: _Attached, prefetch: Prefetch, batch: list[_Page]) -> None:
        places = [page.place for page in batch]

        def call() -> tuple[int, float]:
            start_s = time.perf_counter()
            count = 0 if prefetch.is_over else self._parts.read(places)
            return count, time.perf_counter() - start_s

        def then(done: tuple[int, float]) -> None:
            count, took_s = done
            for at, page in enumerate(batch):
                self._settle(page, is_filled=at < count)
            num_bytes = self._num_bytes(batch[:count])
            self.counts.num_read += count
            self.counts.num_missed += len(batch) - count
            self.counts.bytes_read += num_bytes
            self.counts.read_s += took_s
            self._cost.byte.add(num_bytes, took_s)
            prefetch.num_reads -= 1
            # A page is of no use without the one before.
            prefetch.is_over |= count < len(batch) or not prefetch.num_reads

        def fail(error: Exception) -> None:
            for page in batch:
                self._settle(page, is_filled=False)
            prefetch.num_reads -= 1
            prefetch.is_over = True
            self._failed("read", error)

        attached.reader.do(call, then, fail)

    def _settle(self, page: _Page, *, is_filled: bool) -> None:
        page.copy.is_filled = is_filled
        slots = self._host.slots[page.pool]
        if not is_filled and self._events is not None:
            self._events.tier_lost(STORAGE_TIER, page.pool, page.digest)
        if slots.find(page.digest) is page.copy:
            if is_filled:
                self._tell(HOST_TIER, [page])
                self._tell(STORAGE_TIER, [page])
            else:
                slots.drop(page.digest)
        self._unpin(page.pool, page.copy)

    # ---- both ----------------------------------------------------------------------------------

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
