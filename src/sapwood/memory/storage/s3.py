"""Page copies as objects of a bucket: Amazon's S3, or any server that speaks its protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from sapwood.memory.storage.checked import checked, checked_size, taken
from sapwood.memory.storage.interface import StorageUnavailable

T = TypeVar("T")

PREFIX = "sapwood/kv/"
TIMEOUT_S = 5.0
AT_ONCE = 8
"""Objects that are asked for at the same time."""
CLEARED_AT_ONCE = 1000
_AUTH = {"access_key_id": "access_key_id", "secret_access_key": "secret_access_key"}


class S3Storage:
    """A PageStorage (interface.py). What becomes of old copies, the bucket's own rules say."""

    def __init__(self, store: S3Store, *, prefix: str = PREFIX) -> None:
        self._store = store
        self._prefix = prefix
        self._threads = ThreadPoolExecutor(AT_ONCE, "kv-objects")

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> S3Storage:
        """StorageUnavailable if the bucket cannot be read. Without keys among the settings they are
        those of the environment (AWS_ACCESS_KEY_ID, …) or of the machine."""
        timeout = timedelta(seconds=float(extra.get("timeout_s", TIMEOUT_S)) or TIMEOUT_S)
        endpoint = extra.get("endpoint_url")
        known = {to: extra[name] for name, to in _AUTH.items() if name in extra}
        with _failing():
            store = S3Store(
                extra["bucket"],
                region=extra.get("region", "us-east-1"),
                client_options={
                    "timeout": timeout,
                    "connect_timeout": timeout,
                    "allow_http": str(endpoint).startswith("http://"),
                },
                retry_config={"max_retries": 1, "retry_timeout": timeout},
                **({} if endpoint is None else {"endpoint": endpoint}),
                **known,
            )
            prefix = extra.get("prefix", PREFIX)
            next(iter(obstore.list(store, prefix, chunk_size=1)), None)  # whether that is allowed
        return cls(store, prefix=prefix)

    def batch_exists(self, keys: Sequence[str]) -> int:
        return self._first_ones(self._is_there, keys)

    def batch_get(self, keys: Sequence[str], into: Sequence[memoryview]) -> int:
        return self._first_ones(self._read, list(zip(keys, into, strict=True)))

    def batch_set(self, keys: Sequence[str], values: Sequence[memoryview]) -> int:
        return self._first_ones(self._write, list(zip(keys, values, strict=True)))

    def clear(self) -> None:
        with _failing():
            for listed in obstore.list(self._store, self._prefix, chunk_size=CLEARED_AT_ONCE):
                obstore.delete(self._store, [one["path"] for one in listed])

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _first_ones(self, do: Callable[[T], bool], things: Sequence[T]) -> int:
        """For how many, from the first on, it was done. Several at once; none after a failure."""
        for start in range(0, len(things), AT_ONCE):
            done = list(self._threads.map(do, things[start : start + AT_ONCE]))
            if not all(done):
                return start + done.index(False)
        return len(things)

    def _path(self, key: str) -> str:
        return self._prefix + key

    def _is_there(self, key: str) -> bool:
        with _failing():
            try:
                obstore.head(self._store, self._path(key))
            except FileNotFoundError:
                return False
        return True

    def _read(self, wanted: tuple[str, memoryview]) -> bool:
        key, view = wanted
        with _failing():
            try:
                found = obstore.get(self._store, self._path(key))
            except FileNotFoundError:
                return False
            if found.meta["size"] != checked_size(len(view)):
                return False
            return taken(memoryview(found.bytes()), view)

    def _write(self, given: tuple[str, memoryview]) -> bool:
        key, value = given
        if not self._is_there(key):
            with _failing():
                obstore.put(self._store, self._path(key), checked(value))
        return True


@contextmanager
def _failing() -> Iterator[None]:
    """An error of the server, or of the way there, is StorageUnavailable."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageUnavailable("there is no such bucket") from error
    except (BaseError, OSError, ValueError) as error:
        told = " ".join(str(error).split())
        raise StorageUnavailable(f"S3 says: {told[:300]}") from error
