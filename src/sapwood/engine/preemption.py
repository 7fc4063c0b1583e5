"""Makes room for a more urgent request: in a step by taking back running requests, which wait again
then, and in a full queue by ending a waiting request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from sapwood.engine.admission import ExpectedGrowth, OutputReserve, Precedence, has_room
from sapwood.engine.request_state import RequestState
from sapwood.memory.lease import Lease
from sapwood.memory.ledger import Ledger

Urgency = Callable[[RequestState], int]
"""How urgent a request is now; larger is sooner."""


class Preemption:
    """Chooses the requests that make room: as few as possible, the least urgent first, and only
    those that `Precedence` allows.

    A running request that is taken back keeps its output, and its KV while the pool has room.

    running, free_rows  the scheduler's own lists, which change while requests are taken back
    token_budget        new tokens that a step computes at most
    """

    def __init__(
        self,
        precedence: Precedence,
        ledger: Ledger,
        reserve: OutputReserve,
        *,
        running: Sequence[RequestState],
        free_rows: Sequence[int],
        token_budget: int,
        urgency: Urgency,
    ) -> None:
        self._precedence = precedence
        self._ledger = ledger
        self._reserve = reserve
        self._running = running
        self._free_rows = free_rows
        self._token_budget = token_budget
        self._urgency = urgency

    def victims(self, waiting: Iterable[RequestState]) -> list[RequestState]:
        """Running requests whose place the most urgent waiting request may take.

        The last in the list is taken back first: the least urgent, and among equals the youngest.
        """
        if self._precedence.preemption_threshold is None or not self._running:
            return []
        most = max((self._urgency(state) for state in waiting), default=None)
        if most is None:
            return []
        victims = [
            state
            for state in self._running
            if self._precedence.may_preempt(most, self._urgency(state))
        ]
        return sorted(victims, key=lambda state: (-self._urgency(state), state.arrival))

    def displaced(self, waiting: Iterable[RequestState], urgency: int) -> RequestState | None:
        """The waiting request whose place a new request of that urgency may take; None: there is
        none. Of the requests that have not begun it is the least urgent, among equals the youngest.
        """
        not_begun = (state for state in waiting if state.num_runs == 0)
        ranked = [(self._urgency(state), -state.arrival, state) for state in not_begun]
        least = min(ranked, key=lambda row: row[:2], default=None)
        return None if least is None or least[0] >= urgency else least[2]

    def make_room(
        self,
        state: RequestState,
        victims: Sequence[RequestState],
        take_back: Callable[[RequestState], None],
    ) -> int:
        """Take back as few victims as possible, from the list's end, so that `state` has room.

        Returns how many were taken back: none if `state` has room already, or would have none even
        without all victims.
        """
        # The lease locks the prefix of `state`: what victims leave in the cache must not evict it.
        lease, _ = self._ledger.lease(state.namespace, state.matchable_key())
        trial = _Admission(self, state, lease)
        chosen = _fewest(victims[::-1], trial) or []
        for victim in chosen:
            take_back(victim)
        self._ledger.release(lease)
        return len(chosen)

    def to_retract(
        self, state: RequestState, num_tokens: int, victims: Sequence[RequestState]
    ) -> list[RequestState] | None:
        """As few victims as possible, from the list's end, without whom the running request `state`
        has pages for its first `num_tokens`; None if it would lack pages even without all."""
        return _fewest(victims[::-1], _Growth(self._ledger, state, num_tokens))


class _Trial(Protocol):
    """Finds out whether there would be room without some running requests, which stay."""

    @property
    def has_room(self) -> bool: ...
    def leave_out(self, victim: RequestState) -> None: ...
    def keep(self, victim: RequestState) -> None: ...


def _fewest(candidates: Sequence[RequestState], trial: _Trial) -> list[RequestState] | None:
    """As few candidates as possible, from the list's beginning, without whom there is room; None:
    there is no room even without all of them."""
    chosen: list[RequestState] = []
    for candidate in candidates:
        if trial.has_room:
            break
        trial.leave_out(candidate)
        chosen.append(candidate)
    if not trial.has_room:
        return None
    # The last candidate was needed; with its room, some of those before it may not be needed.
    for candidate in chosen[-2::-1]:
        trial.keep(candidate)
        if trial.has_room:
            chosen.remove(candidate)
        else:
            trial.leave_out(candidate)
    return chosen


class _Growth:
    """Whether the pools have room for the next tokens of a running request."""

    def __init__(self, ledger: Ledger, state: RequestState, num_tokens: int) -> None:
        lease, start = _lease_of(state), state.num_computed_tokens
        self._missing = ledger.needs.missing(lease, num_tokens, start, num_tokens)
        self._pools = ledger.without_leases()

    @property
    def has_room(self) -> bool:
        return self._pools.has(self._missing)

    def leave_out(self, victim: RequestState) -> None:
        self._pools.leave_out(_lease_of(victim))

    def keep(self, victim: RequestState) -> None:
        self._pools.keep(_lease_of(victim))


class _Admission:
    """Whether this step can admit a waiting request: there must be a row, a token of the budget,
    and room in the pools besides what this step's running requests need themselves."""

    def __init__(self, preemption: Preemption, state: RequestState, lease: Lease) -> None:
        ledger = preemption._ledger
        self._ledger = ledger
        self._token_budget = preemption._token_budget
        self._pools = ledger.without_leases()
        self._missing = ledger.needs.most_missing(lease, state.num_tokens, self._token_budget)
        self._growth = ExpectedGrowth(ledger, preemption._reserve)
        self._growth.count(state)
        self._num_running = 0
        self._num_free_rows = len(preemption._free_rows) + len(preemption._running)
        self._num_wanted_tokens = 0
        for running in preemption._running:
            self._count(running, 1)

    @property
    def has_room(self) -> bool:
        return (
            self._num_free_rows > 0
            and self._num_wanted_tokens < self._token_budget
            and has_room(
                missing=self._missing,
                kept_back=self._growth.of_all(),
                available=self._pools.available,
                is_alone=self._num_running == 0,
            )
        )

    def leave_out(self, victim: RequestState) -> None:
        self._count(victim, -1)
        self._pools.leave_out(_lease_of(victim))

    def keep(self, victim: RequestState) -> None:
        self._count(victim, 1)
        self._pools.keep(_lease_of(victim))

    def _count(self, running: RequestState, sign: int) -> None:
        self._num_running += sign
        self._num_free_rows -= sign
        self._growth.count(running, sign)
        if running.is_exhausted:
            return
        self._num_wanted_tokens += sign * running.num_missing_tokens
        # Running requests get room for this step's tokens before any request is admitted.
        start = running.num_computed_tokens
        end = start + min(running.num_missing_tokens, self._token_budget)
        needed = self._ledger.needs.wanted(_lease_of(running), running.num_tokens, start, end)
        for pool, number in enumerate(needed):
            self._missing[pool] += sign * number


def _lease_of(running: RequestState) -> Lease:
    assert running.lease is not None, "a running request has a lease"
    return running.lease
