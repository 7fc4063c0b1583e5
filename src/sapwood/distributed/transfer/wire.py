"""Messages and bytes over a socket that a thread's event loop serves."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Sequence

import msgspec

from sapwood.distributed.transfer.messages import MAX_MESSAGE, encode

_LENGTH = struct.Struct(">I")
MOST_PIECES = 64
"""Pieces of memory in one call of the system."""
BUFFER_BYTES = 4 << 20
ALIVE_S = 1.0
"""Seconds between two signs of life."""
SILENCE_S = 4.0
"""After so many without a sign of life, or in which not a byte could be sent, the other side
counts as gone."""


class Broken(Exception):
    """The other side is gone, silent, or says what nobody understands."""


class Wire:
    """One connection. `send` may be called from one task at a time, and so may `receive`."""

    def __init__(self, connection: socket.socket, silence_s: float = SILENCE_S) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._silence_s = silence_s
        self._sending = asyncio.Lock()

    async def send(self, message: msgspec.Struct, pieces: Sequence[memoryview] = ()) -> None:
        """Send a message and the bytes that belong to it. Raises Broken"""
        body = encode(message)
        views = [memoryview(_LENGTH.pack(len(body)) + body), *pieces]
        async with self._sending:
            for at in range(0, len(views), MOST_PIECES):
                await self._send_all(views[at : at + MOST_PIECES])

    async def receive(self) -> bytes:
        """The next message, encoded. Raises Broken, also if none comes for too long"""
        head = bytearray(_LENGTH.size)
        await self.fill(memoryview(head))
        (size,) = _LENGTH.unpack(head)
        if size > MAX_MESSAGE:
            raise Broken(f"a message of {size} bytes was announced, but {MAX_MESSAGE} are allowed")
        body = bytearray(size)
        await self.fill(memoryview(body))
        return bytes(body)

    async def fill(self, target: memoryview) -> None:
        """Receive exactly so many bytes. Raises Broken"""
        while target:
            try:
                async with asyncio.timeout(self._silence_s):
                    number = await self._loop.sock_recv_into(self._socket, target)
            except TimeoutError:
                raise Broken(f"nothing was heard for {self._silence_s:g} s") from None
            except OSError as error:
                raise Broken(str(error)) from error
            if number == 0:
                raise Broken("the connection was closed")
            target = target[number:]

    def close(self) -> None:
        self._socket.close()

    async def _send_all(self, views: list[memoryview]) -> None:
        while views:
            try:
                number = self._socket.sendmsg(views)
            except (BlockingIOError, InterruptedError):
                await self._until_writable()
                continue
            except OSError as error:
                raise Broken(str(error)) from error
            while views and number >= len(views[0]):
                number -= len(views.pop(0))
            if views and number:
                views[0] = views[0][number:]

    async def _until_writable(self) -> None:
        writable = self._loop.create_future()
        self._loop.add_writer(self._socket, _settle, writable)
        try:
            async with asyncio.timeout(self._silence_s):
                await writable
        except TimeoutError:
            raise Broken(f"the other side took no byte for {self._silence_s:g} s") from None
        finally:
            self._loop.remove_writer(self._socket)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
