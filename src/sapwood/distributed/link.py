"""A connection over which two processes send each other messages, and notice each other's end.

The system closes the connections of a process that ends, however it ends: so the other side knows
at once, without heartbeats.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress

_LENGTH = struct.Struct(">I")
MAX_BYTES = 1 << 30
"""Size of a message at most."""
RETRY_S = 0.2


class Link:
    """One end. Any thread may send; one thread receives."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._connection = connection
        self._reader = connection.makefile("rb")
        self._sending = threading.Lock()

    @property
    def own_host(self) -> str:
        """The address of this machine that the other side reaches."""
        return str(self._connection.getsockname()[0])

    def send(self, message: bytes) -> None:
        """OSError if the other side is gone."""
        with self._sending:
            self._connection.sendall(_LENGTH.pack(len(message)) + message)

    def receive(self, *, max_bytes: int = MAX_BYTES) -> bytes | None:
        """The next message, for which the call waits; None if the other side is gone, or has sent
        more than `max_bytes`. TimeoutError after `set_timeout`."""
        try:
            head = self._reader.read(_LENGTH.size)
            if len(head) < _LENGTH.size:
                return None
            (size,) = _LENGTH.unpack(head)
            if size > max_bytes:
                return None
            message = self._reader.read(size)
        except TimeoutError:
            raise
        except (OSError, ValueError):  # ValueError: closed by this side
            return None
        return message if len(message) == size else None

    def set_timeout(self, timeout_s: float | None) -> None:
        """How long `receive` waits; None: for ever."""
        self._connection.settimeout(timeout_s)

    def on_end(self, act: Callable[[], None]) -> None:
        """Call `act` from a thread as soon as the other side is gone; messages stay unread."""

        def wait() -> None:
            poll = select.poll()
            poll.register(self._connection, select.POLLRDHUP)
            poll.poll()
            act()

        threading.Thread(target=wait, name="link", daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):  # the other side was first
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def connect(host: str, port: int, *, timeout_s: float) -> Link:
    """The end of a process that joins, once somebody listens. TimeoutError if nobody does."""
    until_s = time.monotonic() + timeout_s
    while time.monotonic() < until_s:
        try:
            connection = socket.create_connection((host, port), timeout=timeout_s)
        except (ConnectionRefusedError, socket.gaierror):
            time.sleep(RETRY_S)
            continue
        connection.settimeout(None)
        return Link(connection)
    raise TimeoutError(f"nobody listens at {host}:{port} after {timeout_s:g} s")
