"""Page copies on a server of Redis or Valkey, which many engines may share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from sapwood.memory.storage.checked import checked, taken
from sapwood.memory.storage.interface import StorageUnavailable

PREFIX = "sapwood:kv:"
TIMEOUT_S = 5.0
CLEARED_AT_ONCE = 1000


class RedisStorage:
    """A PageStorage (interface.py). What is not used for `ttl_s`, the server forgets; and what its
    own memory policy says."""

    def __init__(self, client: Redis, *, prefix: str = PREFIX, ttl_s: int | None = None) -> None:
        self._client: Any = client
        self._prefix = prefix
        self._ttl_s = ttl_s

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> RedisStorage:
        """StorageUnavailable if nobody answers there."""
        timeout_s = float(extra.get("timeout_s", TIMEOUT_S)) or TIMEOUT_S
        try:
            client = Redis.from_url(
                extra["url"], socket_timeout=timeout_s, socket_connect_timeout=timeout_s
            )
        except ValueError as error:
            raise StorageUnavailable(f"its url is none: {error}") from None
        with _failing():
            client.ping()
        ttl_s = int(extra.get("ttl_s", 0)) or None
        return cls(client, prefix=extra.get("prefix", PREFIX), ttl_s=ttl_s)

    def batch_exists(self, keys: Sequence[str]) -> int:
        with _failing():
            pipe = self._client.pipeline(transaction=False)
            for key in keys:
                pipe.exists(self._prefix + key)
            found = pipe.execute()
        return next((at for at, one in enumerate(found) if not one), len(keys))

    def batch_get(self, keys: Sequence[str], into: Sequence[memoryview]) -> int:
        with _failing():
            pipe = self._client.pipeline(transaction=False)
            for key in keys:
                if self._ttl_s is None:
                    pipe.get(self._prefix + key)
                else:
                    pipe.getex(self._prefix + key, ex=self._ttl_s)
            found = pipe.execute()
        for at, (value, view) in enumerate(zip(found, into, strict=True)):
            if value is None or not taken(value, view):
                return at
        return len(keys)

    def batch_set(self, keys: Sequence[str], values: Sequence[memoryview]) -> int:
        with _failing():
            missing = self._client.pipeline(transaction=False)
            for key in keys:
                missing.exists(self._prefix + key)
            known = missing.execute()
            pipe = self._client.pipeline(transaction=False)
            for key, value, is_there in zip(keys, values, known, strict=True):
                if not is_there:
                    pipe.set(self._prefix + key, checked(value), ex=self._ttl_s)
            pipe.execute()
        return len(keys)

    def clear(self) -> None:
        with _failing():
            batch: list[bytes] = []
            for key in self._client.scan_iter(match=self._prefix + "*", count=CLEARED_AT_ONCE):
                batch.append(key)
                if len(batch) == CLEARED_AT_ONCE:
                    self._client.unlink(*batch)
                    batch.clear()
            if batch:
                self._client.unlink(*batch)

    def close(self) -> None:
        self._client.close()


@contextmanager
def _failing() -> Iterator[None]:
    """An error of the server, or of the way there, is StorageUnavailable."""
    try:
        yield
    except (RedisError, OSError) as error:
        raise StorageUnavailable(f"Redis says: {error}") from error
