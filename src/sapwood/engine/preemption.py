"""Makes room for a more urgent request: in a step by taking back running ones, and in the queue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from sapwood.engine.admission import OutputReserve, Precedence
from sapwood.engine.request_state import RequestState
from sapwood.memory.ledger import Lease, Ledger

Urgency = Callable[[RequestState], int]
"""How urgent a request is now; larger is sooner."""


class Preemption:
    """As few as possible are taken back, the least urgent first, and only those that `Precedence`
    allows. What they have put out stays, and what they have computed too while the pool has room
    for it.

    running, free_rows  the scheduler's own; they change while requests are taken back
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
        """Running requests whose place the most urgent waiting one may take, the first to go last.

        Among equals the youngest goes first.
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
        """Whose place in the queue a new request of that urgency may take: the least urgent's, and
        the youngest's of these, of those that have not begun; None: nobody's."""
        not_begun = (state for state in waiting if state.num_runs == 0)
        ranked = [(self._urgency(state), -state.arrival, state) for state in not_begun]
        least = min(ranked, key=lambda row: row[:2], default=None)
        return None if least is None or least[0] >= urgency else least[2]

    def make_room(
        self,
        state: RequestState,
        victims: list[RequestState],
        take_back: Callable[[RequestState], None],
    ) -> int:
        """Take victims back, from the last on, until `state` fits; how many were."""
        # Its prefix is locked meanwhile: what the victims leave behind must not push it out.
        lease, _ = self._ledger.lease(state.namespace, state.matchable_key())
        num_taken = 0
        while num_taken < len(victims) and not self._has_room_for(state, lease):
            num_taken += 1
            take_back(victims[-num_taken])
        self._ledger.release(lease)
        return num_taken

    def _has_room_for(self, state: RequestState, lease: Lease) -> bool:
        """Whether this step could admit it: a row, its pages, and a token of the budget."""
        wanted = sum(one.num_missing_tokens for one in self._running if not one.is_exhausted)
        if not self._free_rows or wanted >= self._token_budget:
            return False
        growth = sum(
            self._reserve.expected_growth(one.num_outstanding) for one in [*self._running, state]
        )
        missing = self._ledger.pages_for(state.num_tokens) - len(lease.pages)
        return missing + self._ledger.pages_for(growth) <= self._ledger.num_available_pages
