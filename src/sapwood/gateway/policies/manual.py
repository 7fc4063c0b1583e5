"""Sticky routing: a routing key keeps the worker that it got first."""

from __future__ import annotations

import random
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal

from sapwood.gateway.policies.interface import C, Call, least_loaded

MAX_KEYS = 200_000
"""Keys that are remembered; the one that was used least recently is forgotten first."""

AssignmentMode = Literal["random", "min_load", "min_group"]


class Manual:
    """A key stays with its worker while that worker can take requests, and then gets another.

    A request without a key goes to any worker.
    """

    needs_text = False
    prefixes = None

    def __init__(
        self,
        *,
        mode: str,
        max_idle_s: float,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mode = mode
        self._max_idle_s = max_idle_s
        self._rng = rng
        self._clock = clock
        self._assigned: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._num_keys: Counter[str] = Counter()

    def choose(self, candidates: Sequence[C], call: Call) -> C:
        if not call.key:
            return self._rng.choice(candidates)
        now_s = self._clock()
        self._forget_idle(now_s)
        worker_id, _ = self._assigned.get(call.key, ("", 0.0))
        for candidate in candidates:
            if candidate.id == worker_id:
                self._remember(call.key, worker_id, now_s)
                return candidate
        chosen = self._new_worker(candidates)
        self._remember(call.key, chosen.id, now_s)
        return chosen

    def forget(self, worker_id: str) -> None:
        """Its keys get other workers when they are used next, if it is no candidate then."""

    def _new_worker(self, candidates: Sequence[C]) -> C:
        if self._mode == "min_load":
            return least_loaded(candidates)
        if self._mode == "min_group":
            return min(candidates, key=lambda candidate: self._num_keys[candidate.id])
        return self._rng.choice(candidates)

    def _remember(self, key: str, worker_id: str, now_s: float) -> None:
        self._remove(key)
        self._assigned[key] = (worker_id, now_s)
        self._num_keys[worker_id] += 1
        if len(self._assigned) > MAX_KEYS:
            self._remove(next(iter(self._assigned)))

    def _forget_idle(self, now_s: float) -> None:
        while self._assigned:
            key, (_, used_s) = next(iter(self._assigned.items()))
            if now_s - used_s <= self._max_idle_s:
                return
            self._remove(key)

    def _remove(self, key: str) -> None:
        old = self._assigned.pop(key, None)
        if old is not None:
            self._num_keys[old[0]] -= 1
            if not self._num_keys[old[0]]:
                del self._num_keys[old[0]]
