"""Page copies on LMCache's server (`lmcache_server`), in the memory of another machine.

Source: the messages of LMCache 0.5 (lmcache/v1/protocol.py), of which copies are values in binary
form. The server answers nothing to a copy that it gets, and forgets none.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any
from urllib.parse import urlsplit

from sapwood.memory.storage.checked import checked, checked_size, taken
from sapwood.memory.storage.interface import StorageUnavailable

PREFIX = "sapwood-kv"
TIMEOUT_S = 5.0
DEFAULT_PORT = 65432
SCHEMES = ("lm", "lmcache")
_KEY_BYTES = 150
ASKED = struct.Struct(f"=iiiiiiiii{_KEY_BYTES}s")
"""Command, bytes that follow, format, dtype, place, four sizes; the key, filled up with spaces."""
TOLD = struct.Struct("=iiiiiiiii")
"""Status, bytes that follow, format, dtype, four sizes, place."""
_DONE = 200
_BINARY, _UINT8, _ANYWHERE = 4, 6, 0


class Command(IntEnum):
    PUT = 1
    GET = 2
    EXIST = 3
    HEALTH = 5


class LMCacheStorage:
    """A PageStorage (interface.py)."""

    def __init__(
        self, address: tuple[str, int], *, timeout_s: float = TIMEOUT_S, prefix: str = PREFIX
    ) -> None:
        """Raises StorageUnavailable if nobody answers there."""
        self._address = address
        self._timeout_s = timeout_s
        self._prefix = prefix
        self._idle: list[socket.socket] = []
        with self._connection() as connection:
            self._check_health(connection)

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> LMCacheStorage:
        return cls(
            address_of(extra["url"]),
            timeout_s=float(extra.get("timeout_s", TIMEOUT_S)) or TIMEOUT_S,
            prefix=extra.get("prefix", PREFIX),
        )

    def batch_exists(self, keys: Sequence[str]) -> int:
        with self._connection() as connection:
            for key in keys:
                _ask(connection, Command.EXIST, self._key(key))
            found = [_answer(connection)[0] for _ in keys]
        return found.index(False) if False in found else len(keys)

    def batch_get(self, keys: Sequence[str], into: Sequence[memoryview]) -> int:
        for at, (key, view) in enumerate(zip(keys, into, strict=True)):
            try:
                with self._connection() as connection:
                    if not _fetch(connection, self._key(key), view):
                        return at
            except _Foreign:
                return at
        return len(keys)

    def batch_set(self, keys: Sequence[str], values: Sequence[memoryview]) -> int:
        known = self.batch_exists(keys)
        with self._connection() as connection:
            for key, value in zip(keys[known:], values[known:], strict=True):
                _ask(connection, Command.PUT, self._key(key), checked_size(len(value)))
                connection.sendall(checked(value))
            # Answered after all that came before, so that they are there.
            self._check_health(connection)
        return len(keys)

    def clear(self) -> None:
        raise StorageUnavailable("LMCache's server removes nothing; end it and start it again")

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _check_health(self, connection: socket.socket) -> None:
        _ask(connection, Command.HEALTH, self._key(""))
        if _answer(connection) != (True, 0):
            raise ConnectionError("what answers is no server of LMCache")

    def _key(self, name: str) -> bytes:
        """As LMCache writes keys: model, number of ranks, rank, hash, dtype. Names of copies may be
        longer than a key, so a hash stands for them."""
        text = f"{self._prefix}@1@0@{hashlib.sha256(name.encode()).hexdigest()}@uint8"
        return text.encode().ljust(_KEY_BYTES)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[socket.socket]:
        """One that nobody else uses meanwhile; closed if anything goes wrong."""
        connection = None
        try:
            if self._idle:
                connection = self._idle.pop()
            else:
                connection = socket.create_connection(self._address, self._timeout_s)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield connection
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, OSError):
                host, port = self._address
                raise StorageUnavailable(
                    f"LMCache's server at {host}:{port} does not answer: {error}"
                ) from error
            raise
        self._idle.append(connection)


class _Foreign(Exception):
    """The value is no copy of ours. It may be of any length, so nobody receives it."""


def _fetch(connection: socket.socket, key: bytes, into: memoryview) -> bool:
    """Whether the copy is there and whole; _Foreign if something else comes."""
    _ask(connection, Command.GET, key)
    is_there, num_bytes = _answer(connection)
    if not is_there:
        return False
    if num_bytes != checked_size(len(into)):
        raise _Foreign
    return taken(_received(connection, num_bytes), into)


def address_of(url: str) -> tuple[str, int]:
    """Host and port of LMCache's remote_url, lm://host:port; StorageUnavailable if it is none."""
    try:
        told = urlsplit(url)
        if told.scheme in SCHEMES and told.hostname:
            return told.hostname, told.port or DEFAULT_PORT
    except ValueError:
        pass  # a port that is none, as the error says
    raise StorageUnavailable("its url must be lm://host:port")


def _ask(connection: socket.socket, command: Command, key: bytes, num_bytes: int = 0) -> None:
    connection.sendall(
        ASKED.pack(command, num_bytes, _BINARY, _UINT8, _ANYWHERE, num_bytes, 0, 0, 0, key)
    )


def _answer(connection: socket.socket) -> tuple[bool, int]:
    """(whether it is there, bytes that follow)"""
    status, num_bytes, *_ = TOLD.unpack(_received(connection, TOLD.size))
    return status == _DONE, num_bytes


def _received(connection: socket.socket, num_bytes: int) -> memoryview:
    view = memoryview(bytearray(num_bytes))
    done = 0
    while done < num_bytes:
        count = connection.recv_into(view[done:])
        if not count:
            raise ConnectionError("it has closed the connection")
        done += count
    return view
