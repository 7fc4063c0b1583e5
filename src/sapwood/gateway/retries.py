"""Whether a request that a worker failed is sent again, and when."""

from __future__ import annotations

import random
from dataclasses import dataclass

RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses of an answer after which another worker, or the same one later, may do better."""
WORKER_AT_FAULT = frozenset({500, 502, 503, 504})
"""Statuses that count as failures of the worker; 408 and 429 only say that it is busy."""

MAX_SAVED_RETRIES = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryLimits:
    """max_retries: of one request; budget_ratio: retries per request in the long run, of all"""

    max_retries: int = 5
    initial_backoff_s: float = 0.05
    max_backoff_s: float = 30.0
    multiplier: float = 1.5
    jitter: float = 0.2
    budget_ratio: float = 0.2

    def backoff_s(self, num_retries: int, rng: random.Random) -> float:
        """Seconds to wait after so many retries, before the next one."""
        # Beyond some power the limit holds anyway, and a float would overflow.
        wanted = self.initial_backoff_s * self.multiplier ** min(num_retries, 100)
        spread = 1 + rng.uniform(-self.jitter, self.jitter)
        return min(min(wanted, self.max_backoff_s) * spread, self.max_backoff_s)


class RetryBudget:
    """Limits the retries of all requests together: workers in trouble get little extra load.

    Every request adds a share of a retry, up to MAX_SAVED_RETRIES, and every retry takes one.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._saved = MAX_SAVED_RETRIES

    def add_request(self) -> None:
        self._saved = min(self._saved + self._ratio, MAX_SAVED_RETRIES)

    def take_retry(self) -> bool:
        """Whether the request may be sent again."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True
