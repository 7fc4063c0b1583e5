"""Circuit breakers: a worker that keeps failing gets no requests for a while.

closed --failures in a row--> open --time--> half open --successes in a row--> closed
                               ^                 |
                               +----- failure ---+

Where a worker could not be reached at all, a good health check closes the breaker: the worker was
started anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class BreakerState(IntEnum):
    """The numbers are those of the metric smg_worker_cb_state."""

    CLOSED = 0
    OPEN = 1
    HALF_OPEN = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerLimits:
    """failures: in a row, which open the breaker; successes: in a row, of trial requests, which
    close it; open_s: seconds from its opening to the first trial request"""

    failures: int = 10
    successes: int = 3
    open_s: float = 60.0
    is_off: bool = False


class Breaker:
    """One worker's circuit breaker. Times are seconds of one monotonic clock.

    Half open, it lets one trial request through at a time.
    """

    def __init__(self, limits: BreakerLimits) -> None:
        self._limits = limits
        self._is_closed = True
        self._reopens_s = 0.0
        self._num_in_row = 0
        self._trial_runs = False
        self._was_unreachable = False

    @property
    def is_unreachable(self) -> bool:
        """Whether it is not closed because the worker could not be reached."""
        return self._was_unreachable and not self._is_closed

    def state(self, now_s: float) -> BreakerState:
        if self._is_closed:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now_s < self._reopens_s else BreakerState.HALF_OPEN

    def admits(self, now_s: float) -> bool:
        """Whether a request may be sent now."""
        return self._is_closed or (now_s >= self._reopens_s and not self._trial_runs)

    def sent(self) -> None:
        """A request is sent; exactly one of the three methods below must follow."""
        self._trial_runs = not self._is_closed

    def succeeded(self) -> None:
        was_trial, self._trial_runs = self._trial_runs, False
        if self._is_closed:
            self._num_in_row = 0
            return
        if not was_trial:  # sent before the breaker opened
            return
        self._num_in_row += 1
        if self._num_in_row >= self._limits.successes:
            self._is_closed, self._num_in_row = True, 0

    def failed(self, now_s: float, *, unreachable: bool = False) -> None:
        """unreachable: there was not even a connection"""
        self._trial_runs = False
        self._was_unreachable = unreachable
        if self._limits.is_off:
            return
        if self._is_closed:
            self._num_in_row += 1
            if self._num_in_row < self._limits.failures:
                return
        self._is_closed, self._num_in_row = False, 0
        self._reopens_s = now_s + self._limits.open_s

    def reached(self) -> None:
        """The worker, which could not be reached, answers health checks."""
        if self.is_unreachable:
            self._is_closed, self._num_in_row, self._was_unreachable = True, 0, False

    def ended(self) -> None:
        """The request says nothing about the worker: its client has left, or it was refused."""
        self._trial_runs = False
