"""What the scheduler asks of the tiers behind the KV pool: longer prefixes for waiting requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from sapwood.base.clock import Clock
from sapwood.engine.arrivals import Arrivals, HostPage
from sapwood.engine.request_state import RequestState
from sapwood.engine.stored_pages import StoredPages
from sapwood.memory.lease import Lease
from sapwood.memory.ledger import Ledger
from sapwood.memory.namespace import Namespace, page_digests
from sapwood.memory.node import TOKEN_BYTES
from sapwood.memory.prefix_tree import first_needed_page
from sapwood.memory.tiers.host import HostTier
from sapwood.memory.tiers.rates import CostRule
from sapwood.schema.output import TierUse
from sapwood.schema.step import CopiedPage

LEAST_TOKENS = 10
LEAST_MEASURED = 64
"""Tokens of prompts in a step that tells what one costs."""


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

    def __init__(
        self,
        ledger: Ledger,
        host: HostTier,
        *,
        stored: StoredPages | None = None,
        loads: CostRule | None = None,
        page_bytes: int = 0,
        clock: Clock | None = None,
        least_tokens: int = LEAST_TOKENS,
        arrivals: Arrivals | None = None,
    ) -> None:
        """stored        the storage behind the host; None: there can be none
        loads         whether copies from the host are quicker than computing; None: always
        page_bytes    of a page in all pools together
        clock         measures what prompts cost, for these rules
        least_tokens  a hit that is longer by fewer tokens is not worth its copies
        arrivals      brings pages that another engine has computed; None: none does"""
        self._arrivals = arrivals
        self._stored = stored
        self._loads = loads
        self._bytes_per_page = page_bytes
        self._clock = clock
        self._begun: dict[int, tuple[float, int]] = {}
        self._last_end_s = 0.0
        self._least_tokens = least_tokens
        self._ledger = ledger
        self._host = host
        self._page_bytes = ledger.page_size * TOKEN_BYTES
        self._known: dict[str, _Known] = {}
        self.num_hit_tokens = 0
        """Tokens that came back, from the storage too."""
        self.num_stored_tokens = 0

    @property
    def has_orders(self) -> bool:
        """Whether the next plan has something to copy."""
        return self._host.has_orders

    @property
    def use(self) -> TierUse:
        host, stored = self._host, self._stored
        counts = {} if stored is None else asdict(stored.counts)
        return TierUse(
            num_host_tokens=self.num_hit_tokens - self.num_stored_tokens,
            num_stored_tokens=self.num_stored_tokens,
            num_host_pages=sum(map(len, host.slots)),
            num_host_slots=sum(slots.num_slots for slots in host.slots),
            num_saved=host.num_saved,
            num_restored=host.num_restored,
            storage="" if stored is None else stored.backend or "",
            **counts,
        )

    @property
    def host(self) -> HostTier:
        return self._host

    @property
    def stored(self) -> StoredPages | None:
        return self._stored

    @property
    def is_busy(self) -> bool:
        """Whether a storage is at work, whose results shall be taken in soon."""
        return self._stored is not None and self._stored.is_busy

    @property
    def num_held(self) -> int:
        """Requests that wait for pages from the storage, or from another engine."""
        num_stored = 0 if self._stored is None else self._stored.num_held
        return num_stored + (0 if self._arrivals is None else self._arrivals.num_held)

    def take_orders(self, step: int) -> tuple[list[CopiedPage], list[CopiedPage]]:
        """As `HostTier.take_orders`."""
        if self._stored is not None:
            self._stored.planned(step)
        return self._host.take_orders(step)

    def begin_step(self, step: int, num_prompt_tokens: int) -> None:
        """A plan with so many tokens of prompts is made."""
        if self._clock is not None and num_prompt_tokens >= LEAST_MEASURED:
            self._begun[step] = self._clock.now_s(), num_prompt_tokens

    def end_step(self, step: int) -> None:
        """The result of that plan is there."""
        self._host.executed(step)
        if self._stored is not None:
            self._stored.executed(step)
        if self._clock is None:
            return
        now_s = self._clock.now_s()
        begun = self._begun.pop(step, None)
        if begun is not None and self._loads is not None:
            begin_s, num_tokens = begun
            self._loads.token.add(num_tokens, now_s - max(begin_s, self._last_end_s))
        self._last_end_s = now_s

    def clear(self) -> None:
        """Forget what the tiers in memory hold."""
        self._host.clear()
        if self._stored is not None:
            self._stored.forget()

    def close(self) -> None:
        """Write what waits, and use the storage no longer."""
        if self._stored is not None:
            self._stored.detach()
        if self._arrivals is not None:
            self._arrivals.close()

    def weights_changed(self) -> None:
        """As `StoredPages.weights_changed`."""
        if self._stored is not None:
            self._stored.weights_changed()

    def arrive(self, state: RequestState) -> None:
        """A request waits from now on: look for its pages elsewhere."""
        if self._arrivals is not None and self._arrivals.has_place(state.options.handover):
            self._arrivals.begin(state, self._lacking(state))
            return
        stored = self._stored
        if stored is None or not stored.is_attached or not state.uses_prefixes:
            return
        shared = stored.names_in(state.namespace)
        if shared is None:
            return
        key = self._ledger.matchable(state.matchable_key())
        digests = names = self._digests_of(state, key)
        if shared != state.namespace:
            names = page_digests(shared, key, self._page_bytes)
        known = self._reach(state.namespace, key, digests, 0)
        stored.begin(
            state.request_id,
            state.namespace,
            key,
            digests,
            names,
            known,
            self._ledger.page_size,
        )

    def poll(self) -> None:
        """Take in what the storage and other engines have brought. To be called once per turn."""
        if self._stored is not None:
            self._stored.poll()
        if self._arrivals is not None:
            self._arrivals.poll()

    def holds(self, state: RequestState) -> bool:
        """Whether the request waits for pages from the storage, or from another engine."""
        if self._arrivals is not None and self._arrivals.holds(state.request_id):
            return True
        return self._stored is not None and self._stored.holds(state.request_id)

    def leave(self, state: RequestState) -> None:
        """The request waits no longer."""
        self._known.pop(state.request_id, None)
        if self._stored is not None:
            self._stored.leave(state.request_id)
        if self._arrivals is not None:
            self._arrivals.leave(state)

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
        if self._loads is not None and not self._loads.pays(
            (end - begin) * self._bytes_per_page, (end - begin) * page_size
        ):
            return begin * page_size
        digests = self._digests_of(state, key)
        # What has to make room for these pages must not take their slots on the host.
        with self._host.keeping(self._needed(digests, begin, end)):
            empty = ledger.restore(lease, key[: end * self._page_bytes])
            restored = empty or ()
            was_stored = [
                self._host.load(pool, digests[index], number) for pool, index, number in restored
            ]
        if empty is not None:
            num_tokens = (lease.num_shared - begin) * page_size
            num_stored = num_tokens * sum(was_stored) // max(len(was_stored), 1)
            self.num_hit_tokens += num_tokens
            self.num_stored_tokens += num_stored
            state.tier_tokens = num_tokens - num_stored, num_stored
        return lease.num_shared * page_size

    def _lacking(self, state: RequestState) -> list[HostPage]:
        """What the longest prefix of a waiting request needs besides what the tree has."""
        ledger = self._ledger
        key = ledger.matchable(state.matchable_key())
        digests, namespace = self._digests_of(state, key), state.namespace
        lease, num_hit = ledger.lease(namespace, state.matchable_key())
        ledger.release(lease)
        if num_hit == len(digests) * ledger.page_size:
            return []
        return self._places(digests, ledger.known_pages(namespace, key), len(digests))

    def _needed(self, digests: Sequence[bytes], begin: int, end: int) -> list[tuple[int, bytes]]:
        """(pool, digest) of all that may have to come from the host for the pages begin .. end - 1
        of a prefix."""
        return [(pool, digest) for pool, _, digest in self._places(digests, begin, end)]

    def _places(self, digests: Sequence[bytes], begin: int, end: int) -> list[HostPage]:
        """The same, each with its index."""
        needs, size = self._ledger.needs, self._ledger.page_size
        firsts = [] if needs.full is None else [(needs.full, begin)]
        firsts += [
            (pool, max(begin, first_needed_page(window, end * size, size)))
            for pool, window in needs.windows
        ]
        firsts += [] if needs.state is None else [(needs.state, end - 1)]
        return [
            (pool, index, digests[index]) for pool, first in firsts for index in range(first, end)
        ]

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
