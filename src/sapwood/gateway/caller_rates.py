"""How many requests per second each caller may send, so that one cannot take all."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Protocol

from sapwood.http.callers import Caller
from sapwood.http.errors import TooManyRequests

MOST_CALLERS = 100_000
"""Callers that are remembered; those that were here least recently are forgotten first."""


class CallerRates:
    """A bucket of tokens for each caller, which holds one second's number and at least one.

    max_per_second  requests that each caller may send per second
    """

    def __init__(self, max_per_second: float) -> None:
        self._rate = max_per_second
        self._most = max(1.0, max_per_second)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def take(self, caller: Caller) -> None:
        """Count one request; 429 if the caller has sent too many."""
        now_s = asyncio.get_running_loop().time()
        tokens, filled_s = self._buckets.get(caller.name, (self._most, now_s))
        tokens = min(tokens + (now_s - filled_s) * self._rate, self._most)
        is_refused = tokens < 1
        self._buckets[caller.name] = (tokens if is_refused else tokens - 1, now_s)
        self._buckets.move_to_end(caller.name)
        if len(self._buckets) > MOST_CALLERS:
            self._buckets.popitem(last=False)
        if is_refused:
            raise too_many(caller, self._rate, tokens)


class Rates(Protocol):
    async def take(self, caller: Caller) -> None:
        """Count one request; TooManyRequests if the caller has sent too many."""
        ...


def too_many(caller: Caller, rate: float, tokens: float) -> TooManyRequests:
    """rate: requests per second that the caller may send; tokens: what is left in its bucket"""
    return TooManyRequests(
        f"{caller.name} may send {rate:g} requests per second; try again in "
        f"{(1 - tokens) / rate:.1f} s"
    )
