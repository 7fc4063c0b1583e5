"""Deadlines: how long a request may wait, and how long it may take."""

from __future__ import annotations

from collections.abc import Iterable

from sapwood.engine.request_state import RequestState
from sapwood.schema.config.scheduler import ResolvedScheduler
from sapwood.schema.output import Finish

CHECK_INTERVAL_S = 0.02
"""Seconds between two looks at all open requests; a request may overrun its deadline by this."""


class Deadlines:
    """Finds requests that wait or run longer than the options allow."""

    def __init__(self, config: ResolvedScheduler) -> None:
        self._queue_timeout_s = config.queue_timeout
        self._request_timeout_s = config.request_timeout
        self._next_check_s = 0.0

    def overdue(
        self, requests: Iterable[RequestState], now_s: float
    ) -> list[tuple[RequestState, Finish]]:
        """The open requests whose time is up, each with the `Finish` that it gets."""
        if not (self._queue_timeout_s or self._request_timeout_s) or now_s < self._next_check_s:
            return []
        self._next_check_s = now_s + CHECK_INTERVAL_S
        late = ((state, self._why_ended(state, now_s)) for state in requests)
        return [(state, finish) for state, finish in late if finish is not None]

    def _why_ended(self, state: RequestState, now_s: float) -> Finish | None:
        age_s = now_s - state.arrival_s
        if self._request_timeout_s and age_s >= self._request_timeout_s:
            return Finish(
                kind="error",
                message=f"the request was not done within {self._request_timeout_s:g} s, the "
                "server's --request-timeout; ask for fewer tokens, or try again when it is idle",
                status=504,
                error_type="TimeoutError",
            )
        if self._queue_timeout_s and state.num_runs == 0 and age_s >= self._queue_timeout_s:
            return Finish(
                kind="error",
                message=f"the request waited for {self._queue_timeout_s:g} s, the server's "
                "--queue-timeout, and was not begun; try again later",
                status=503,
                error_type="ServiceUnavailableError",
            )
        return None
