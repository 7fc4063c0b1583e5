"""Turns what the prefix tree tells into KV events."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from sapwood.memory.listener import Stretch
from sapwood.memory.namespace import MEDIUM, branches_of
from sapwood.memory.node import TOKEN_BYTES
from sapwood.schema.kv_events import (
    DEVICE_TIER,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEvent,
    PageHash,
)

NamedAdapter = Callable[[str], str]


class KVEventSource:
    """Hears of the tree's pages in the pool that keeps every token; other pools have no events.

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
            name = PageHash.name(digest)
            ids = array("I", own).tolist()
            stored = BlockStored([name], parent, ids, stretch.page_size, lora_id, DEVICE_TIER)
            self._publish(stored)
            parent = name

    def evicted(self, stretch: Stretch) -> None:
        self.removed(stretch)

    def removed(self, stretch: Stretch) -> None:
        if stretch.pool != self._pool:
            return
        # The last page first: whoever follows never knows a page without the ones before.
        for number in reversed(stretch.numbers):
            self._lora_ids.pop(number, None)
            self._publish(BlockRemoved([PageHash.name(self._digests.pop(number))]))

    def used(self, stretch: Stretch) -> None:
        pass  # no event tells of it

    def cleared(self) -> None:
        self._digests.clear()
        self._lora_ids.clear()
        self._publish(AllBlocksCleared())


def _lora_id(adapter: str) -> int | None:
    """The same number for a name everywhere: readers expect a number, and adapters have none."""
    return PageHash.name(PageHash.seed(adapter)) if adapter else None
