"""Page copies in Mooncake's store: the memory of many machines, which its master knows.

Source: the Python interface of mooncake-transfer-engine 0.3.13 (MooncakeDistributedStore).
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from mooncake.store import MooncakeDistributedStore

from sapwood.memory.storage.checked import checked, taken
from sapwood.memory.storage.interface import StorageUnavailable

PREFIX = "sapwood-kv-"
GIB = 2**30
OWN = "1gb"
"""Of this process's memory that the store gets, if the settings do not say."""
_BUFFER_BYTES = 128 << 20
"""Through which copies go in and out of the store."""
TIMEOUT_S = 5.0
_PEER_TO_PEER = "P2PHANDSHAKE"
_NOT_THERE = 0


class MooncakeStorage:
    """A PageStorage (interface.py). Copies lie in memory that the engines give the store; where
    there is no room, the master lets those go that were used longest ago, and with an engine goes
    what lies in its memory."""

    def __init__(self, store: Any, *, prefix: str = PREFIX) -> None:
        self._store = store
        self._prefix = prefix

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> MooncakeStorage:
        """StorageUnavailable if the master does not take this process in."""
        address = extra["master_server_address"]
        _check_there(address, float(extra.get("timeout_s", TIMEOUT_S)) or TIMEOUT_S)
        store = MooncakeDistributedStore()
        status = store.setup(
            extra.get("local_hostname", "127.0.0.1"),
            extra.get("metadata_server", _PEER_TO_PEER),
            int(float(extra.get("global_segment_size", OWN).lower().removesuffix("gb")) * GIB),
            _BUFFER_BYTES,
            extra.get("protocol", "tcp"),
            extra.get("device_name", ""),
            address,
        )
        if status != 0:
            raise StorageUnavailable(
                f"Mooncake's master at {address} does not take this engine in (status {status})"
            )
        return cls(store, prefix=extra.get("prefix", PREFIX))

    def batch_exists(self, keys: Sequence[str]) -> int:
        found = self._store.batch_is_exist(self._names(keys))
        if any(one < 0 for one in found):
            raise StorageUnavailable(f"Mooncake's store answers with status {min(found)}")
        return next((at for at, one in enumerate(found) if one == _NOT_THERE), len(keys))

    def batch_get(self, keys: Sequence[str], into: Sequence[memoryview]) -> int:
        found = self._store.get_batch(self._names(keys))
        for at, (value, view) in enumerate(zip(found, into, strict=True)):
            # What is not there is an empty text, which no copy is.
            if not taken(value, view):
                return at
        return len(keys)

    def batch_set(self, keys: Sequence[str], values: Sequence[memoryview]) -> int:
        known = self._store.batch_is_exist(self._names(keys))
        missing = [at for at, one in enumerate(known) if one != 1]
        if missing:
            names = self._names([keys[at] for at in missing])
            status = self._store.put_batch(names, [checked(values[at]) for at in missing])
            if status != 0:
                raise StorageUnavailable(f"Mooncake's store keeps nothing: status {status}")
        return len(keys)

    def clear(self) -> None:
        # By force: the store keeps a lease of some seconds on what was read.
        status = self._store.remove_by_regex(f"^{re.escape(self._prefix)}.*", True)
        if status < 0:
            raise StorageUnavailable(f"Mooncake's store removes nothing: status {status}")

    def close(self) -> None:
        self._store.close()

    def _names(self, keys: Sequence[str]) -> list[str]:
        return [self._prefix + key for key in keys]


def _check_there(address: str, timeout_s: float) -> None:
    """StorageUnavailable if nobody listens there: the library itself would try for 90 s."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout_s):
            return
    except (OSError, ValueError) as error:
        raise StorageUnavailable(
            f"Mooncake's master at {address} cannot be reached: {error}"
        ) from None
