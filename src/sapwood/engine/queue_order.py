"""The waiting requests in the order of the schedule policy."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from sapwood.engine.policy import (
    FIRST_COME,
    LONGEST_PREFIX,
    LPM_QUEUE_LIMIT,
    SCHEDULE_POLICIES,
    Waiting,
)
from sapwood.engine.request_state import RequestState
from sapwood.memory.ledger import Ledger


class QueueOrder:
    """Orders the waiting requests by the policy of that name.

    urgency  gives a request's urgency now
    """

    def __init__(
        self,
        policy_name: str,
        ledger: Ledger,
        rng: random.Random,
        urgency: Callable[[RequestState], int],
    ) -> None:
        self._policy = SCHEDULE_POLICIES.get(policy_name)
        self._ledger = ledger
        self._rng = rng
        self._urgency = urgency

    def of(
        self, waiting: Sequence[RequestState], running: Sequence[RequestState]
    ) -> list[RequestState]:
        policy = self._policy
        if policy is LONGEST_PREFIX and len(waiting) > LPM_QUEUE_LIMIT:
            policy = FIRST_COME
        keys = Counter(state.options.routing_key for state in running if policy.needs_keys)
        seen = [
            Waiting(
                index=index,
                priority=self._urgency(state),
                arrival=state.arrival,
                max_new_tokens=state.num_outstanding,
                path=self._ledger.prefix_path(state.namespace, state.matchable_key())
                if policy.needs_path
                else (),
                num_same_key=keys[state.options.routing_key] if state.options.routing_key else 0,
            )
            for index, state in enumerate(waiting)
        ]
        order = [entry.index for entry in policy.order(seen, self._rng)]
        assert len(order) == len(waiting), "a policy keeps every request"
        return [waiting[index] for index in order]


def per_routing_key(states: Iterable[RequestState]) -> tuple[int, ...]:
    """For each routing key of the requests: how many of them have it."""
    keys = Counter(state.options.routing_key for state in states if state.options.routing_key)
    return tuple(keys.values())
