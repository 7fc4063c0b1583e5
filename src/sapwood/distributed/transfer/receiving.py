"""The side that wants pages: it joins rooms, and has their pages written into its own rows.

All of it but the public methods of `PageReceiver` runs in one thread. The engine's thread says what
it wants and which rows are free for it, and hears by `events` what has come.
"""

from __future__ import annotations

import asyncio
import socket
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import msgspec
import numpy as np
from numpy.typing import NDArray

from sapwood.distributed.transfer.facts import PageFacts
from sapwood.distributed.transfer.messages import (
    MAGIC,
    PROTOCOL,
    Alive,
    Done,
    Hello,
    Pages,
    Received,
    Refused,
    Run,
    Want,
    decode_told,
)
from sapwood.distributed.transfer.segment import Segment
from sapwood.distributed.transfer.thread import LoopThread
from sapwood.distributed.transfer.wire import ALIVE_S, Broken, Wire
from sapwood.schema.handover import Handover

CONNECT_S = 3.0
LEAVE_S = 600.0
"""So long rows that another process may still write to are not used again, if it does not leave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Pages that one request wants.

    number  tells it from other orders
    place   where they are
    prompt  as in `Want`
    rows    the row of each page of the runs, in their order
    """

    number: int
    place: Handover
    prompt: bytes
    runs: Sequence[Run]
    rows: Sequence[int]


@dataclass(frozen=True, slots=True)
class Fetched:
    """Nothing more will come of an order.

    arrived  (pool, index) of the pages that are there
    why      what went wrong; "": all that there is has come
    """

    number: int
    arrived: frozenset[tuple[int, int]]
    why: str = ""


@dataclass(frozen=True, slots=True)
class Freed:
    """Nobody writes to the order's rows any more. It comes after `Fetched`."""

    number: int


class PageReceiver:
    """Close it in any case."""

    def __init__(
        self,
        facts: PageFacts,
        rows: Sequence[NDArray[np.uint8]],
        segment: Segment | None,
        *,
        needs_segment: bool = False,
        checks: bool = False,
        wait_s: float = 300.0,
    ) -> None:
        """rows           per pool [rows, bytes of a page]
        segment        the memory of these rows, as others reach it; None: they cannot
        needs_segment  whether pages that come over the connection are refused
        checks         whether each page's bytes are checked by a sum
        wait_s         how long a prompt may take"""
        self.events: SimpleQueue[Fetched | Freed] = SimpleQueue()
        self._facts = facts
        self._rows = rows
        self._segment = segment
        self._needs_segment = needs_segment
        self._checks = checks
        self._wait_s = wait_s
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._thread = LoopThread("page-receiver")

    # ---- from the engine's thread --------------------------------------------------------------

    def fetch(self, order: Order) -> None:
        """Its rows must stay free until `Freed`."""
        self._thread.call(lambda: self._begin(order))

    def leave(self, number: int) -> None:
        """Nobody wants the order any more; `Fetched` and `Freed` still come."""
        self._thread.call(lambda: self._leave(number))

    def close(self) -> None:
        self._thread.close()

    # ---- orders ----------------------------------------------------------------------------------

    def _begin(self, order: Order) -> None:
        self._tasks[order.number] = self._thread.keep(self._fetch(order))

    def _leave(self, number: int) -> None:
        task = self._tasks.get(number)
        if task is not None:
            task.cancel()

    async def _fetch(self, order: Order) -> None:
        arrived: set[tuple[int, int]] = set()
        connection: socket.socket | None = None
        why = ""
        try:
            async with asyncio.timeout(self._wait_s):
                connection = await _connected(order.place)
                why = await self._receive(connection, order, arrived)
        except TimeoutError:
            why = f"the prompt was not read in {self._wait_s:g} s"
        except (Broken, OSError) as error:
            why = str(error) or type(error).__name__
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            why = f"it said what nobody understands: {error}"
        except asyncio.CancelledError:
            why = "the request was aborted"
        self._tasks.pop(order.number, None)  # from here on nobody can hurry it
        self.events.put(Fetched(order.number, frozenset(arrived), why))
        try:
            if connection is not None and why and self._segment is not None and order.rows:
                await _until_left(connection)
        finally:
            if connection is not None:
                connection.close()
            self.events.put(Freed(order.number))

    async def _receive(
        self, connection: socket.socket, order: Order, arrived: set[tuple[int, int]]
    ) -> str:
        """Returns why the other side refused; "" if everything has come. Raises Broken"""
        wire, facts = Wire(connection), self._facts
        hello = Hello(PROTOCOL, facts.identity, facts.page_size, self._segment, self._checks)
        rows = [] if self._segment is None else list(order.rows)
        await asyncio.get_running_loop().sock_sendall(connection, MAGIC)
        await wire.send(hello)
        await wire.send(Want(order.place.room, order.prompt, list(order.runs), rows))
        indices = [(run.pool, run.first + at) for run in order.runs for at in range(run.count)]
        wanted = dict(zip(indices, order.rows, strict=True))
        telling = self._thread.keep(_tell_of_life(wire))
        try:
            while True:
                message = decode_told(await wire.receive())
                match message:
                    case Refused():
                        return message.why
                    case Done():
                        await wire.send(Received())
                        return ""
                    case Pages():
                        await self._take(wire, message, wanted, arrived)
                    case Alive():
                        pass
        finally:
            telling.cancel()

    async def _take(
        self,
        wire: Wire,
        told: Pages,
        wanted: dict[tuple[int, int], int],
        arrived: set[tuple[int, int]],
    ) -> None:
        """Raises Broken"""
        if told.is_placed != (self._segment is not None) and (
            told.is_placed or self._needs_segment
        ):
            raise Broken(
                "the engine that reads prompts cannot reach this one's memory; both must run on "
                "one machine as one user, or take --disaggregation-transfer-backend auto"
            )
        if told.sums and len(told.sums) != told.count:
            raise Broken("a page has no sum")
        for at in range(told.count):
            key = told.pool, told.first + at
            row = wanted.pop(key, None)
            if row is None:
                raise Broken("it sent a page that nobody asked for")
            target = self._rows[told.pool][row]
            if not told.is_placed:
                await wire.fill(memoryview(target))
            if told.sums and zlib.crc32(target) != told.sums[at]:
                raise Broken("a page's bytes are not those that were sent: their sums differ")
            arrived.add(key)


async def _connected(place: Handover) -> socket.socket:
    """Raises Broken"""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_S):
            found = await loop.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
            family, kind, protocol, _, address = found[0]
            connection = socket.socket(family, kind, protocol)
            connection.setblocking(False)
            try:
                await loop.sock_connect(connection, address)
            except BaseException:
                connection.close()
                raise
            return connection
    except (TimeoutError, OSError) as error:
        why = str(error) or f"no answer in {CONNECT_S:g} s"
        raise Broken(f"nobody is reached at {place.host}:{place.port}: {why}") from error


async def _tell_of_life(wire: Wire) -> None:
    """Until the connection breaks, which whoever receives from it hears."""
    while True:
        await asyncio.sleep(ALIVE_S)
        try:
            await wire.send(Alive())
        except Broken:
            return


async def _until_left(connection: socket.socket) -> None:
    """Wait until the other process has closed its end, and so no longer writes to our memory."""
    loop = asyncio.get_running_loop()
    try:
        connection.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(LEAVE_S):
            while await loop.sock_recv(connection, 1 << 16):
                pass
    except (OSError, TimeoutError):
        pass  # a broken connection has no writer either; and one that hangs so long is stopped
