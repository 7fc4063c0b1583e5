"""The requests that run. Each holds a row, a lease and its adapter's slot, from its first step
until it ends or has to wait again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from sapwood.base.clock import Clock
from sapwood.engine.adapters import AdapterSlots
from sapwood.engine.prefixes import PrefixesInProgress
from sapwood.engine.request_state import Phase, RequestState
from sapwood.memory.lease import Lease
from sapwood.memory.ledger import Ledger


class RunningRequests:
    """In the order in which they were admitted.

    states     the requests; only `begin` and `leave` change this list
    free_rows  rows that no request holds, likewise
    """

    def __init__(
        self,
        ledger: Ledger,
        prefixes: PrefixesInProgress,
        adapters: AdapterSlots,
        clock: Clock,
        *,
        num_rows: int,
    ) -> None:
        self._ledger = ledger
        self._prefixes = prefixes
        self._adapters = adapters
        self._clock = clock
        self._ended_rows: list[int] = []
        self.states: list[RequestState] = []
        self.free_rows = list(range(num_rows - 1, -1, -1))

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self.states)

    @property
    def has_ended_rows(self) -> bool:
        """Whether the next plan has rows to name in `StepPlan.ends`."""
        return bool(self._ended_rows)

    def take_ended_rows(self) -> list[int]:
        """For `StepPlan.ends`: rows that requests with a grammar have left since the last call."""
        ended, self._ended_rows = self._ended_rows, []
        return ended

    def begin(self, state: RequestState, lease: Lease, num_hit: int, counts: Counter[str]) -> None:
        """Let a waiting request run; the lease has the KV of its first `num_hit` tokens."""
        state.move_to(Phase.RUNNING)
        state.lease = lease
        state.begin_run(self.free_rows.pop())
        state.adapter_slot = self._adapters.acquire(state.adapter)
        state.num_computed_tokens = num_hit
        self._ledger.count_hit(lease)
        if state.num_cached_tokens is None:
            state.num_cached_tokens = min(num_hit, state.num_prompt_tokens)
            state.queue_time_s = self._clock.now_s() - state.arrival_s
            counts["cached"] += state.num_cached_tokens
        self.states.append(state)
        self._prefixes.announce(state)

    def leave(self, state: RequestState) -> None:
        """Give back what the request holds; its KV stays as a prefix while the pool has room."""
        assert state.lease is not None, "a running request has a lease"
        num_shareable = min(state.num_computed_tokens, state.num_known_tokens)
        if state.shares_prefixes:
            self._ledger.commit(state.lease, state.key(num_shareable))
        self._ledger.release(state.lease)
        self._prefixes.withdraw(state)
        state.lease = None
        if state.options.sampling.grammar is not None:
            self._ended_rows.append(state.row)
        self.free_rows.append(state.row)
        self._adapters.release(state.adapter)
        state.row = -1
        self.states.remove(state)

    def share_prompt(self, state: RequestState) -> None:
        """Let other requests hit the computed part of the prompt, after each of its chunks."""
        assert state.lease is not None, "a running request has a lease"
        num_computed = min(state.num_computed_tokens, state.num_prompt_tokens)
        num_pages = num_computed // self._ledger.page_size
        if state.shares_prefixes and num_pages > state.lease.num_shared:
            self._ledger.commit(state.lease, state.key(num_computed))
        if num_computed == state.num_prompt_tokens:
            self._prefixes.withdraw(state)
