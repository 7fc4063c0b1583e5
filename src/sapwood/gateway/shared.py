"""What several gateways have in common, in Redis: sticky keys, and how much each caller has sent.

A gateway whose Redis does not answer goes on by itself for a while: keys may then move to other
workers, and a caller may send as much to each gateway as it may send to all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from hashlib import blake2b
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from sapwood.gateway.caller_rates import CallerRates, too_many
from sapwood.history.redis import open_client
from sapwood.http.callers import Caller

log = logging.getLogger(__name__)

PREFIX = "sapwood:gateway:"
ANSWER_S = 0.5
"""A request does not wait longer for Redis."""
ALONE_S = 5.0
"""After a failure Redis is not asked for so long."""
MOST_IDLE_S = 10**9

# The worker that the key has, if it is among those that can be used now; else the chosen one.
_SETTLE = """
    local held = redis.call('GET', KEYS[1])
    if held then
        for i = 3, #ARGV do
            if ARGV[i] == held then
                redis.call('EXPIRE', KEYS[1], ARGV[2])
                return held
            end
        end
    end
    redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
    return ARGV[1]
"""
# A bucket of tokens, as in caller_rates.py, by the clock of Redis. Tokens below 1: refused.
_TAKE = """
    local now = redis.call('TIME')
    local now_s = now[1] + now[2] / 1000000
    local rate, most = tonumber(ARGV[1]), tonumber(ARGV[2])
    local held = redis.call('HMGET', KEYS[1], 'tokens', 'at')
    local tokens = tonumber(held[1] or most)
    local elapsed_s = math.max(0, now_s - tonumber(held[2] or now_s))
    tokens = math.min(tokens + elapsed_s * rate, most)
    local left = tokens
    if tokens >= 1 then left = tokens - 1 end
    redis.call('HSET', KEYS[1], 'tokens', left, 'at', now_s)
    redis.call('EXPIRE', KEYS[1], math.ceil(math.min(most / rate, 1000000)) + 1)
    return tostring(tokens)
"""


class SharedState:
    """Keys and rates that all gateways with the same Redis share.

    max_idle_s      a sticky key that is not used for so long is forgotten
    max_per_second  requests that each caller may send per second, to all gateways together; None:
                    no limit
    """

    def __init__(self, client: Redis, *, max_idle_s: float, max_per_second: float | None) -> None:
        self._settle: Any = client.register_script(_SETTLE)
        self._take: Any = client.register_script(_TAKE)
        self._max_idle_s = min(max(1, int(max_idle_s)), MOST_IDLE_S)
        self._rate = max_per_second or 0.0
        self._own_rates = CallerRates(self._rate) if max_per_second is not None else None
        self._alone_until_s = 0.0

    async def settle(self, key: str, chosen: str, candidates: Sequence[str]) -> str:
        """The id of the worker that the routing key has at all gateways.

        chosen      the worker that the key gets if it has none of the candidates
        candidates  ids of workers that can take the request
        """
        place = f"{PREFIX}key:{_digest(key)}"
        held = await self._asked(self._settle, place, chosen, self._max_idle_s, *candidates)
        return chosen if held is None else _text(held)

    async def take(self, caller: Caller) -> None:
        """Count one request; TooManyRequests if the caller has sent too many."""
        if self._own_rates is None:
            return
        place = f"{PREFIX}rate:{_digest(caller.name)}"
        told = await self._asked(self._take, place, self._rate, max(1.0, self._rate))
        if told is None:
            await self._own_rates.take(caller)
        elif float(_text(told)) < 1:
            raise too_many(caller, self._rate, float(_text(told)))

    async def _asked(self, script: Any, key: str, *args: object) -> Any:
        """What Redis answers; None if it does not, or did not lately."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._alone_until_s:
            return None
        try:
            async with asyncio.timeout(ANSWER_S):
                return await script(keys=[key], args=args)
        except (RedisError, OSError, TimeoutError) as error:
            self._alone_until_s = loop.time() + ALONE_S
            # The error's text may hold the address, and that a password.
            log.warning(
                "the Redis that gateways share does not answer (%s); this one goes on by itself "
                "for %g s",
                type(error).__name__,
                ALONE_S,
            )
            return None


@asynccontextmanager
async def open_shared(
    url: str, *, max_connections: int, max_idle_s: float, max_per_second: float | None
) -> AsyncIterator[SharedState]:
    """The state in the Redis at that address; ConfigError if it cannot be used."""
    async with open_client(url, max_connections=max_connections) as client:
        yield SharedState(client, max_idle_s=max_idle_s, max_per_second=max_per_second)


def _digest(name: str) -> str:
    """Names are strangers' texts of any length, and say who somebody is."""
    return blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _text(told: bytes | str) -> str:
    return told.decode() if isinstance(told, bytes) else told
