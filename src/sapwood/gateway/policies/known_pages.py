"""Which pages the workers' prefix caches hold, as their KV events tell."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import msgspec

from sapwood.schema.kv_events import DEVICE_TIER, HOST_TIER, STORAGE_TIER, PageHash

MAX_PAGES = 1 << 20
"""Of one source; some 100 bytes each. No engine of today has so many."""

MAX_IDS_BYTES = 1 << 20
"""Of a prompt's token ids in JSON; a longer prompt is not looked up."""


def token_ids(spelled: bytes) -> array[int] | None:
    """The first prompt's token ids, as JSON spells them; None if that is no list of ids."""
    if len(spelled) > MAX_IDS_BYTES:
        return None
    try:
        told = msgspec.json.decode(spelled)
        if not isinstance(told, list):
            return None
        first = told[0] if told and isinstance(told[0], list) else told
        return array("I", first) if set(map(type, first)) == {int} else None
    except (msgspec.DecodeError, OverflowError, RecursionError, UnicodeDecodeError):
        return None


ON_DEVICE = 1
_BITS = {DEVICE_TIER: ON_DEVICE, HOST_TIER: 2, STORAGE_TIER: 4}
_OTHER = 8
"""Of all tiers that others may have."""


def _bit(medium: str | None) -> int:
    return ON_DEVICE if medium is None else _BITS.get(medium, _OTHER)


@dataclass(slots=True)
class PageSet:
    """The names of the pages of one cache, each with the tiers that have it; `page_size` is that of
    its first page."""

    page_size: int = 0
    names: dict[int, int] = field(default_factory=dict)

    def add(self, names: Iterable[int], page_size: int, medium: str | None = None) -> None:
        """medium: the tier that has them now, in the word of the events; None: the device"""
        if page_size != self.page_size:
            self.names.clear()
            self.page_size = page_size
        for name in names:
            self.names[name] = self.names.get(name, 0) | _bit(medium)
        while len(self.names) > MAX_PAGES:
            del self.names[next(iter(self.names))]

    def remove(self, names: Iterable[int], medium: str | None = None) -> None:
        """medium: the tier that has them no longer; None: no tier has"""
        for name in names:
            left = 0 if medium is None else self.names.get(name, 0) & ~_bit(medium)
            if left:
                self.names[name] = left
            else:
                self.names.pop(name, None)


class KnownPages:
    """The caches of all workers that are followed. One thread changes it and another asks: each
    single change or question is atomic, and what is told a moment later does no harm."""

    def __init__(self) -> None:
        self._caches: dict[str, tuple[PageSet, ...]] = {}

    def begin(self, worker_id: str, num_caches: int) -> tuple[PageSet, ...]:
        """Follow a worker anew, of whose caches nothing is known. Returns what is to be filled."""
        caches = self._caches[worker_id] = tuple(PageSet() for _ in range(num_caches))
        return caches

    def end(self, worker_id: str) -> None:
        self._caches.pop(worker_id, None)

    def num_pages(self, worker_id: str) -> int:
        return sum(len(cache.names) for cache in self._caches.get(worker_id, ()))

    def follows_all(self, worker_ids: Iterable[str]) -> bool:
        return all(worker_id in self._caches for worker_id in worker_ids)

    def holders(self, ids: array[int], worker_ids: Collection[str]) -> tuple[int, list[str]]:
        """(tokens of the longest beginning of the prompt that a worker holds in whatever tiers,
        those workers: the ones first that have most of it on the device).

        Takes time for the tokens that some worker holds, and not for those behind."""
        caches = [(one, cache) for one in worker_ids for cache in self._caches.get(one, ())]
        best, found = 0, list(worker_ids)
        on_device: dict[str, int] = {}
        for page_size in {cache.page_size for _, cache in caches if cache.page_size > 0}:
            left = [pair for pair in caches if pair[1].page_size == page_size]
            digest, end = b"", 0
            while left and end + page_size < len(ids):  # the last token is always computed
                digest = PageHash.of(digest, ids[end : end + page_size].tobytes())
                name = PageHash.name(digest)
                left = [pair for pair in left if name in pair[1].names]
                if not left:
                    break
                end += page_size
                for worker_id, cache in left:
                    if cache.names.get(name, 0) & ON_DEVICE:
                        on_device[worker_id] = on_device.get(worker_id, 0) + page_size
                if end > best:
                    best, found = end, [worker_id for worker_id, _ in left]
        return best, sorted(found, key=lambda worker_id: -on_device.get(worker_id, 0))
