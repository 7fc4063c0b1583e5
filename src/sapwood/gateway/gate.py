"""How many requests are at the workers at once, how many per second, and how many wait."""

from __future__ import annotations

import asyncio
from collections import deque

from sapwood.base.errors import SapwoodError
from sapwood.http.errors import RequestTimeout, TooManyRequests


class Gate:
    """Lets requests through, first come, first served.

    max_open       requests between `enter` and `leave`; None: no limit
    max_waiting    requests that wait; any further one is refused with 429
    max_wait_s     a request that has waited so long is refused with 408
    max_per_second requests let through per second, of which one second's number may come at once;
                   None: no limit
    """

    def __init__(
        self,
        *,
        max_open: int | None,
        max_waiting: int,
        max_wait_s: float,
        max_per_second: float | None,
    ) -> None:
        self._max_open = max_open
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._rate = max_per_second
        self._tokens = max(1.0, max_per_second or 0.0)
        self._filled_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.num_open = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def enter(self) -> None:
        """Returns when the request may go on; `leave` must follow. 408 or 429 if it may not."""
        if not self._waiting and self._has_room():
            self._let_in()
            return
        if len(self._waiting) >= self._max_waiting:
            raise TooManyRequests(
                f"{len(self._waiting)} requests wait already, and no more may; try again later, or "
                "start the gateway with a larger --queue-size or --max-concurrent-requests"
            )
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._wake_when_there_is_a_token()
        try:
            async with asyncio.timeout(self._max_wait_s):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled():
                self.leave()  # let in and given up in the same moment
            elif place in self._waiting:
                self._waiting.remove(place)
            if isinstance(error, TimeoutError):
                raise self._too_late() from None
            raise

    def leave(self) -> None:
        self.num_open -= 1
        self._admit()

    def _too_late(self) -> SapwoodError:
        return RequestTimeout(
            f"the request has waited {self._max_wait_s:g} s for its turn; try again later, or "
            "start the gateway with more workers or a larger --queue-timeout-secs"
        )

    def _admit(self) -> None:
        while self._waiting and self._has_room():
            place = self._waiting.popleft()
            if not place.done():
                self._let_in()
                place.set_result(None)
        self._wake_when_there_is_a_token()

    def _let_in(self) -> None:
        self.num_open += 1
        if self._rate is not None:
            self._tokens -= 1

    def _has_room(self) -> bool:
        if self._max_open is not None and self.num_open >= self._max_open:
            return False
        if self._rate is None:
            return True
        now_s = asyncio.get_running_loop().time()
        gained = (now_s - self._filled_s) * self._rate
        self._tokens = min(self._tokens + gained, max(1.0, self._rate))
        self._filled_s = now_s
        return self._tokens >= 1

    def _wake_when_there_is_a_token(self) -> None:
        if self._rate is None or self._timer is not None or not self._waiting:
            return
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(1 - self._tokens, 0.01) / self._rate, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._admit()
