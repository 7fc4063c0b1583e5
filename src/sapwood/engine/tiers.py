"""What the scheduler asks of the tiers behind the KV pool: longer prefixes for waiting requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sapwood.engine.request_state import RequestState
from sapwood.memory.lease import Lease
from sapwood.memory.ledger import Ledger
from sapwood.memory.namespace import Namespace, page_digests
from sapwood.memory.node import TOKEN_BYTES
from sapwood.memory.prefix_tree import first_needed_page
from sapwood.memory.tiers.host import HostTier
from sapwood.schema.step import CopiedPage

LEAST_TOKENS = 10


@dataclass(slots=True)
class _Known:
    """The digests of a waiting request's pages."""

    namespace: Namespace
    digests: list[bytes] = field(default_factory=list)


class CacheTiers:
    """Lengthens the prefixes of requests that are about to run by pages that the host has.

    The pages become the tree's, as if they had just been computed, and the next plan fills them.
    So whoever hits them in the same plan finds them, and nothing has to be undone if the request
    ends or must wait.
    """

    def __init__(self, ledger: Ledger, host: HostTier, *, least_tokens: int = LEAST_TOKENS) -> None:
        """least_tokens  a hit that is longer by fewer tokens is not worth its copies"""
        self._least_tokens = least_tokens
        self._ledger = ledger
        self._host = host
        self._page_bytes = ledger.page_size * TOKEN_BYTES
        self._known: dict[str, _Known] = {}
        self.num_hit_tokens = 0

    @property
    def has_orders(self) -> bool:
        """Whether the next plan has something to copy."""
        return self._host.has_orders

    def take_orders(self) -> tuple[list[CopiedPage], list[CopiedPage]]:
        """As `HostTier.take_orders`."""
        return self._host.take_orders()

    def clear(self) -> None:
        """Forget what the tiers in memory hold."""
        self._host.clear()

    def leave(self, state: RequestState) -> None:
        """The request waits no longer."""
        self._known.pop(state.request_id, None)

    def extend(self, state: RequestState, lease: Lease) -> int:
        """Lengthen the prefix of a request's new lease as far as the host has its pages, and the
        pools have room for the whole request. Returns the tokens of the prefix."""
        ledger = self._ledger
        page_size, begin = ledger.page_size, lease.num_shared
        if not state.uses_prefixes:
            return begin * page_size
        key = ledger.matchable(state.matchable_key())
        end = self._reach(state.namespace, key, self._digests_of(state, key), begin)
        missing = ledger.needs.pages_for(state.num_tokens) - begin
        full = ledger.needs.full
        if (end - begin) * page_size < self._least_tokens or (
            full is not None and missing > ledger.available()[full]
        ):
            return begin * page_size
        digests = self._digests_of(state, key)
        # What has to make room for these pages must not take their slots on the host.
        with self._host.keeping(self._needed(digests, begin, end)):
            empty = ledger.restore(lease, key[: end * self._page_bytes])
            for pool, index, number in empty or ():
                self._host.load(pool, digests[index], number)
        if empty is not None:
            self.num_hit_tokens += (lease.num_shared - begin) * page_size
        return lease.num_shared * page_size

    def _needed(self, digests: Sequence[bytes], begin: int, end: int) -> list[tuple[int, bytes]]:
        """(pool, digest) of all that may have to come from the host for the pages begin .. end - 1
        of a prefix."""
        needs, size = self._ledger.needs, self._ledger.page_size
        firsts = [] if needs.full is None else [(needs.full, begin)]
        firsts += [
            (pool, max(begin, first_needed_page(window, end * size, size)))
            for pool, window in needs.windows
        ]
        firsts += [] if needs.state is None else [(needs.state, end - 1)]
        return [(pool, digest) for pool, first in firsts for digest in digests[first:end]]

    def _digests_of(self, state: RequestState, key: bytes) -> list[bytes]:
        """Of the pages of a waiting request's key."""
        known = self._known.get(state.request_id)
        namespace, num_pages = state.namespace, len(key) // self._page_bytes
        if known is None or known.namespace != namespace or len(known.digests) != num_pages:
            digests = page_digests(namespace, key, self._page_bytes)
            known = self._known[state.request_id] = _Known(namespace, digests)
        return known.digests

    def _reach(self, namespace: Namespace, key: bytes, digests: Sequence[bytes], begin: int) -> int:
        """Up to which page the request could go on if the host's pages came back; `begin` if that
        is no further than without them."""
        needs, has = self._ledger.needs, self._host.has
        limit = len(digests)
        if needs.full is not None:
            limit = max(self._ledger.known_pages(namespace, key), begin)
            while limit < len(digests) and has(needs.full, digests[limit]):
                limit += 1
        runs = []  # per window: where the run of pages before each place begins
        for pool, _ in needs.windows:
            run = [0] * (limit + 1)
            for at in range(begin, limit):
                run[at + 1] = run[at] if has(pool, digests[at]) else at + 1
            runs.append(run)
        for end in range(limit, begin, -1):
            if needs.state is not None and not has(needs.state, digests[end - 1]):
                continue
            if all(
                first_needed_page(window, end * self._ledger.page_size, self._ledger.page_size)
                >= run[end]
                for (_, window), run in zip(needs.windows, runs, strict=True)
            ):
                return end
        return begin
