"""Sends prompts of similar length to the same worker, so that short ones do not wait for long."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate

from sapwood.gateway.policies.interface import Balance, C, Call, least_loaded

MAX_SAMPLES = 4096
FIRST_BOUND_BYTES = 4096
"""Step between the first bounds, before any prompt has been seen."""


class Bucket:
    """Worker i takes the prompts between bound i - 1 and bound i; on a bound, either worker may.

    The bounds are placed anew every `interval_s` seconds so that each bucket has an equal share of
    the latest prompts' bytes. Unbalanced workers are balanced first.
    """

    needs_text = True
    prefixes = None

    def __init__(
        self,
        *,
        interval_s: float,
        balance: Balance,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interval_s = interval_s
        self._balance = balance
        self._clock = clock
        self._lengths: deque[int] = deque(maxlen=MAX_SAMPLES)
        self._bounds: list[int] = []
        self._num_buckets = 0
        self._placed_s = 0.0

    def choose(self, candidates: Sequence[C], call: Call) -> C:
        length = len(call.text)
        self._lengths.append(length)
        now_s = self._clock()
        if self._num_buckets != len(candidates) or now_s - self._placed_s >= self._interval_s:
            self._num_buckets, self._placed_s = len(candidates), now_s
            self._bounds = bounds(self._lengths, self._num_buckets)
        if self._balance.is_lost(candidates):
            return least_loaded(candidates)
        # Bounds are equal where one length has more than a bucket's share.
        first, last = bisect_left(self._bounds, length), bisect_right(self._bounds, length)
        return least_loaded(candidates[first : last + 1])

    def forget(self, worker_id: str) -> None:
        """Nothing is remembered about single workers."""


def bounds(lengths: Sequence[int], num_buckets: int) -> list[int]:
    """The upper bounds of all buckets but the last, in ascending order.

    Each bucket gets an equal share of the sum of all lengths, as nearly as they allow.
    """
    ordered = sorted(lengths)
    sums = list(accumulate(ordered))
    if not sums or sums[-1] == 0:
        return [FIRST_BOUND_BYTES * 2**i for i in range(num_buckets - 1)]
    shares = (sums[-1] * i / num_buckets for i in range(1, num_buckets))
    return [ordered[min(bisect_right(sums, share), len(ordered) - 1)] for share in shares]
