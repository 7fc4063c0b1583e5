"""Turns what the prefix tree tells into KV events."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from msgspec import structs

from sapwood.memory.listener import Stretch
from sapwood.memory.namespace import MEDIUM, Namespace, base_of, branches_before, branches_of
from sapwood.memory.node import TOKEN_BYTES
from sapwood.schema.kv_events import (
    DEVICE_TIER,
    HOST_TIER,
    STORAGE_TIER,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEvent,
    PageHash,
)

NamedAdapter = Callable[[str], str]


MOST_STORED = 1 << 18
"""Pages of which a storage is known to have them; it may have more, and be others' too."""


class KVEventSource:
    """Hears of the pages that keep every token, in the tree and in the tiers behind it; windows and
    states have no events.

    The hash of each page in the tree is kept (120 bytes), so a page costs one hash when it is
    stored, however long its prefix is.
    """

    def __init__(
        self, publish: Callable[[KVEvent], None], pool: int, adapter_of: NamedAdapter
    ) -> None:
        """A source of events for a tree that is empty.

        publish     takes events in their order, without waiting
        pool        index of the pool that keeps every token
        adapter_of  the adapter whose requests have a namespace; "": the base model
        """
        self._publish = publish
        self._pool = pool
        self._adapter_of = adapter_of
        self._digests: dict[int, bytes] = {}  # by the page's number
        self._lora_ids: dict[int, int] = {}  # of pages that an adapter has computed
        self._behind: dict[str, dict[int, None]] = {HOST_TIER: {}, STORAGE_TIER: {}}
        """By tier: the names of the pages that were told of, the oldest first."""

    # ---- the tree: memory.listener.CacheListener -----------------------------------------------

    def stored(self, stretch: Stretch) -> None:
        if stretch.pool != self._pool:
            return
        before = stretch.page_before
        digest, parent, lora_id = b"", None, None
        if before is not None:
            digest = self._digests[before]
            parent, lora_id = PageHash.name(digest), self._lora_ids.get(before)
        elif stretch.root:
            digest = PageHash.seed(stretch.root)
            lora_id = _lora_id(self._adapter_of(stretch.root))
        if stretch.mark:
            digest = PageHash.of(digest, stretch.mark.encode())
            adapters = [name for name in branches_of(stretch.mark) if not name.startswith(MEDIUM)]
            lora_id = _lora_id(adapters[0]) if adapters else lora_id
        tokens = stretch.tokens
        size = stretch.page_size * TOKEN_BYTES
        for at, number in enumerate(stretch.numbers):
            own = tokens[at * size : (at + 1) * size]
            digest = self._digests[number] = PageHash.of(digest, own)
            if lora_id is not None:
                self._lora_ids[number] = lora_id
            told = _told(digest, parent, own, lora_id)
            self._publish(told)
            (parent,) = told.block_hashes

    def evicted(self, stretch: Stretch) -> None:
        self.removed(stretch)

    def removed(self, stretch: Stretch) -> None:
        if stretch.pool != self._pool:
            return
        # The last page first: whoever follows never knows a page without the ones before.
        for number in reversed(stretch.numbers):
            self._lora_ids.pop(number, None)
            self._publish(BlockRemoved([PageHash.name(self._digests.pop(number))], DEVICE_TIER))

    def used(self, stretch: Stretch) -> None:
        pass  # no event tells of it

    def cleared(self) -> None:
        self._digests.clear()
        self._lora_ids.clear()
        for known in self._behind.values():
            known.clear()
        self._publish(AllBlocksCleared())

    # ---- the tiers behind it: memory.tiers.host.HostListener -----------------------------------

    def saved(self, stretch: Stretch, copies: Sequence[tuple[bytes, object]]) -> None:
        new = {digest for digest, _ in copies}
        for digest, told in self.pages_of(stretch).items():
            if digest in new:
                self.tier_has(HOST_TIER, told)

    def dropped(self, pool: int, digest: bytes) -> None:
        self.tier_lost(HOST_TIER, pool, digest)

    def pages_of(self, stretch: Stretch) -> dict[bytes, BlockStored]:
        """By digest: what there is to tell of these pages, in their order; none of other pools."""
        if stretch.pool != self._pool:
            return {}
        root, marks = stretch.names
        digests, size = stretch.digests, stretch.page_size * TOKEN_BYTES
        lora_id = self._lora_id_in(root, branches_of(marks))
        before, tokens = stretch.digest_before, stretch.tokens
        found = {}
        for at, digest in enumerate(digests):
            parent = None if before is None else PageHash.name(before)
            own = tokens[at * size : (at + 1) * size]
            found[digest] = _told(digest, parent, own, lora_id)
            before = digest
        return found

    def page_of_prompt(
        self, pool: int, namespace: Namespace, key: bytes, digests: Sequence[bytes], index: int
    ) -> BlockStored | None:
        """The same of one page of a prompt, by its key; None: it is of another pool."""
        if pool != self._pool:
            return None
        size = len(key) // len(digests)
        names = [one.name for one in branches_before(namespace, (index + 1) * size)]
        parent = PageHash.name(digests[index - 1]) if index else None
        own = key[index * size : (index + 1) * size]
        lora_id = self._lora_id_in(base_of(namespace), names)
        return _told(digests[index], parent, own, lora_id)

    def tier_has(self, medium: str, told: BlockStored) -> None:
        """A tier behind the device has that page from now on."""
        known, (name,) = self._behind[medium], told.block_hashes
        if name in known:
            return
        known[name] = None
        self._publish(structs.replace(told, medium=medium))
        if medium == STORAGE_TIER and len(known) > MOST_STORED:
            self._lose(medium, next(iter(known)))

    def tier_lost(self, medium: str, pool: int, digest: bytes) -> None:
        """It has that page no longer, if it had it."""
        if pool == self._pool:
            self._lose(medium, PageHash.name(digest))

    def tier_emptied(self, medium: str) -> None:
        """It has none of the pages that were told of."""
        for name in list(self._behind[medium]):
            self._lose(medium, name)

    def _lose(self, medium: str, name: int) -> None:
        known = self._behind[medium]
        if name in known:
            del known[name]
            self._publish(BlockRemoved([name], medium))

    def _lora_id_in(self, root: str, branches: Sequence[str]) -> int | None:
        adapters = [name for name in branches if not name.startswith(MEDIUM)]
        return _lora_id(adapters[0] if adapters else self._adapter_of(root) if root else "")


def _told(digest: bytes, parent: int | None, tokens: bytes, lora_id: int | None) -> BlockStored:
    ids = array("I", tokens).tolist()
    return BlockStored([PageHash.name(digest)], parent, ids, len(ids), lora_id, DEVICE_TIER)


def _lora_id(adapter: str) -> int | None:
    """The same number for a name everywhere: readers expect a number, and adapters have none."""
    return PageHash.name(PageHash.seed(adapter)) if adapter else None
