"""The side that has pages: it listens, and sends each room's pages to whoever joins the room.

All of it but the public methods of `PageSender` runs in one thread. The engine's thread offers
rooms and hands over memory to read; it hears by `events` when somebody has joined, when memory has
been read, and how a room has ended.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from queue import SimpleQueue

import msgspec
import numpy as np
from numpy.typing import NDArray

from sapwood.base.errors import ConfigError
from sapwood.distributed.transfer.bootstrap import HTTP_BEGINNINGS, answer_http
from sapwood.distributed.transfer.facts import PageFacts
from sapwood.distributed.transfer.messages import (
    MAGIC,
    MAX_RUNS,
    PROTOCOL,
    Alive,
    Done,
    Hello,
    Pages,
    Received,
    Refused,
    Run,
    Want,
    decode_asked,
)
from sapwood.distributed.transfer.segment import PeerSegment, Segment
from sapwood.distributed.transfer.thread import LoopThread
from sapwood.distributed.transfer.wire import ALIVE_S, SILENCE_S, Broken, Wire

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 4096
ROOM_WAIT_S = 30.0
"""How long somebody may wait for a room that nobody has offered yet."""
MOST_SEGMENTS = 16
BATCH_PAGES = 32
"""Pages between two looks at whether the other side is still there."""

PagePieces = Sequence[NDArray[np.uint8]]
"""The bytes of one page: a piece from each stretch of memory that has some."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Pages of one pool in a row, whose memory stays as it is until `Read` tells of it.

    token  which `Read` this is
    """

    token: int
    pool: int
    first: int
    pages: Sequence[PagePieces]


@dataclass(frozen=True, slots=True)
class Joined:
    """Somebody wants these pages of the room."""

    room: int
    runs: Sequence[Run]


@dataclass(frozen=True, slots=True)
class Read:
    """Nobody reads the batch with that token any more."""

    token: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The room is over. why: what went wrong; "": the other side has everything"""

    room: int
    why: str = ""


SenderEvent = Joined | Read | Ended


@dataclass(slots=True, eq=False)
class _Room:
    prompt: bytes
    outbox: asyncio.Queue[Batch | Done | Refused] = field(default_factory=asyncio.Queue)
    is_joined: bool = False


class PageSender:
    """Close it in any case."""

    def __init__(
        self, host: str, port: int, facts: PageFacts, *, silence_s: float = SILENCE_S
    ) -> None:
        """Listens there from now on. ConfigError if that is not possible

        silence_s  after so long without a sign of life the other side counts as gone"""
        self.events: SimpleQueue[SenderEvent] = SimpleQueue()
        self._facts = facts
        self._silence_s = silence_s
        self._rooms: dict[int, _Room] = {}
        self._awaited: dict[int, list[asyncio.Future[None]]] = {}
        self._segments: OrderedDict[Segment, PeerSegment] = OrderedDict()
        self._num_connections = 0
        self._listener = _listening(host, port)
        self.port = int(self._listener.getsockname()[1])
        self._thread = LoopThread("page-sender")
        self._thread.start(self._accept())

    # ---- from the engine's thread --------------------------------------------------------------

    def offer(self, room: int, prompt: bytes) -> None:
        """Somebody may join that room from now on, for the pages of that prompt."""
        self._thread.call(lambda: self._open(room, prompt))

    def send(self, room: int, batch: Batch) -> None:
        """The room must have been joined."""
        self._thread.call(lambda: self._put(room, batch))

    def finish(self, room: int) -> None:
        """All batches of the room have been handed over."""
        self._thread.call(lambda: self._put(room, Done()))

    def withdraw(self, room: int, why: str) -> None:
        """The room's pages will not come."""
        self._thread.call(lambda: self._withdraw(room, why))

    def close(self) -> None:
        self._thread.close()
        self._listener.close()

    # ---- rooms -----------------------------------------------------------------------------------

    def _open(self, room: int, prompt: bytes) -> None:
        self._rooms[room] = _Room(prompt)
        for waiting in self._awaited.pop(room, ()):
            if not waiting.done():
                waiting.set_result(None)

    def _put(self, room: int, item: Batch | Done | Refused) -> None:
        known = self._rooms.get(room)
        if known is not None:
            known.outbox.put_nowait(item)
        elif isinstance(item, Batch):
            self.events.put(Read(item.token))

    def _withdraw(self, room: int, why: str) -> None:
        known = self._rooms.get(room)
        if known is not None and known.is_joined:
            known.outbox.put_nowait(Refused(why))
        else:
            self._rooms.pop(room, None)

    def _end(self, number: int, room: _Room, why: str) -> None:
        """Whoever had joined the room is gone."""
        del self._rooms[number]
        while not room.outbox.empty():
            item = room.outbox.get_nowait()
            if isinstance(item, Batch):
                self.events.put(Read(item.token))
        self.events.put(Ended(number, why))

    # ---- connections -----------------------------------------------------------------------------

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as error:  # too many open files, for instance
                log.warning("a connection for pages was not accepted: %s", error)
                await asyncio.sleep(ALIVE_S)
                continue
            if self._num_connections >= MAX_CONNECTIONS:
                connection.close()
                continue
            self._num_connections += 1
            self._thread.keep(self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        wire = Wire(connection, self._silence_s)
        try:
            beginning = bytearray(len(MAGIC))
            await wire.fill(memoryview(beginning))
            if bytes(beginning) in HTTP_BEGINNINGS:
                own_host = str(connection.getsockname()[0])
                await answer_http(connection, bytes(beginning), own_host, self.port, self._facts)
            elif bytes(beginning) == MAGIC:
                await self._serve_room(wire)
        except (Broken, OSError):
            pass  # it never joined a room, so nobody waits for what it wanted
        except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError):
            log.warning("something at the port for pages did not speak its protocol")
        finally:
            self._num_connections -= 1
            wire.close()

    async def _serve_room(self, wire: Wire) -> None:
        hello, want = decode_asked(await wire.receive()), decode_asked(await wire.receive())
        if not isinstance(hello, Hello) or not isinstance(want, Want):
            raise Broken("it did not say what it wants")
        listening = self._thread.keep(_listen(wire))
        try:
            why = self._why_refused(hello, want) or await self._why_no_room(wire, want, listening)
            if why:
                log.warning("pages were refused: %s", why)
                await wire.send(Refused(why))
                return
            room = self._rooms[want.room]
            room.is_joined = True
            self.events.put(Joined(want.room, want.runs))
            try:
                why = await self._send_room(wire, room, hello, want, listening)
            except (Broken, ValueError) as error:
                why = str(error) or "it failed"
            except asyncio.CancelledError:
                why = "the server is shutting down"
                raise
            finally:
                self._end(want.room, room, why)
        finally:
            listening.cancel()

    def _why_refused(self, hello: Hello, want: Want) -> str:
        """Why these two cannot exchange pages; "" if they can."""
        facts = self._facts
        if hello.protocol != PROTOCOL:
            return (
                f"the decode engine speaks version {hello.protocol} of the transfer protocol, but "
                f"this engine speaks version {PROTOCOL}; start both from one version of sapwood"
            )
        if hello.page_size != facts.page_size:
            return (
                f"the decode engine has pages of {hello.page_size} tokens, but this engine of "
                f"{facts.page_size}; start both with the same --page-size"
            )
        if hello.identity != facts.identity:
            return (
                "the two engines do not compute the same pages: their models, weights, "
                "--kv-cache-dtype, --speculative-algorithm or kernels differ; start both with the "
                "same ones"
            )
        num_pages = sum(run.count for run in want.runs)
        is_in_bounds = len(want.runs) <= MAX_RUNS and all(
            0 <= run.pool < len(facts.row_bytes) and run.first >= 0 and 0 < run.count <= 1 << 24
            for run in want.runs
        )
        if not is_in_bounds or (hello.segment is not None and len(want.rows) != num_pages):
            return "the decode engine wants pages that no prompt has"
        return ""

    async def _why_no_room(self, wire: Wire, want: Want, listening: asyncio.Task[None]) -> str:
        """Waits until the room is offered. Why it cannot be joined; "" if it can."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + ROOM_WAIT_S
        while want.room not in self._rooms:
            if loop.time() >= until_s:
                return f"no request has the room {want.room} here"
            offered = loop.create_future()
            self._awaited.setdefault(want.room, []).append(offered)
            try:
                await asyncio.wait(
                    {offered, listening}, timeout=ALIVE_S, return_when="FIRST_COMPLETED"
                )
            finally:
                waiting = self._awaited.get(want.room, [])
                if offered in waiting:
                    waiting.remove(offered)
                if not waiting:
                    self._awaited.pop(want.room, None)
            if listening.done():
                raise Broken("it has left")
            await wire.send(Alive())
        room = self._rooms[want.room]
        if not hmac.compare_digest(room.prompt, want.prompt):
            return (
                f"the room {want.room} is that of another prompt, or the two engines do not have "
                "the same weights or the same adapter any more; update both"
            )
        return f"the room {want.room} has been joined already" if room.is_joined else ""

    async def _send_room(
        self, wire: Wire, room: _Room, hello: Hello, want: Want, listening: asyncio.Task[None]
    ) -> str:
        """Returns why it has failed; "" if the other side has everything. Raises Broken"""
        sums = zlib.crc32 if hello.checked else None
        target = None if hello.segment is None else self._segment(hello.segment)
        rows: dict[tuple[int, int], int] = {}
        if target is not None:
            indices = [(run.pool, run.first + at) for run in want.runs for at in range(run.count)]
            rows = dict(zip(indices, want.rows, strict=True))
        while True:
            item = await _next(room, listening)
            if isinstance(item, Batch):
                try:
                    for at in range(0, len(item.pages), BATCH_PAGES):
                        await _send_pages(wire, _part(item, at), target, rows, sums)
                finally:
                    self.events.put(Read(item.token))
                continue
            await wire.send(Alive() if item is None else item)
            if isinstance(item, Refused):
                return item.why
            if isinstance(item, Done):
                break
        await asyncio.wait({listening}, timeout=self._silence_s)
        if not listening.done():
            raise Broken(f"the decode engine did not confirm its pages in {self._silence_s:g} s")
        listening.result()
        return ""

    def _segment(self, segment: Segment) -> PeerSegment | None:
        """That memory; None if this process cannot reach it."""
        known = self._segments.get(segment)
        if known is None:
            try:
                known = PeerSegment(segment, self._facts.row_bytes)
            except (OSError, ValueError):
                return None
            self._segments[segment] = known
            if len(self._segments) > MOST_SEGMENTS:
                self._segments.popitem(last=False)
        self._segments.move_to_end(segment)
        return known


def _listening(host: str, port: int) -> socket.socket:
    """ConfigError if nobody can listen there."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise ConfigError(
            f"--disaggregation-bootstrap-port {port} of {host} cannot be listened at: {error}; "
            "choose another port"
        ) from None
    listener.setblocking(False)
    return listener


async def _listen(wire: Wire) -> None:
    """Returns once the other side has everything. Raises Broken, also if it falls silent"""
    while True:
        try:
            message = decode_asked(await wire.receive())
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise Broken(f"the decode engine said what nobody understands: {error}") from error
        if isinstance(message, Received):
            return
        if not isinstance(message, Alive):
            raise Broken("the decode engine spoke out of turn")


async def _next(room: _Room, listening: asyncio.Task[None]) -> Batch | Done | Refused | None:
    """What is to be sent next; None: nothing for a while. Raises Broken if the other side left"""
    getting = asyncio.ensure_future(room.outbox.get())
    try:
        await asyncio.wait({getting, listening}, timeout=ALIVE_S, return_when="FIRST_COMPLETED")
        if getting.done():
            return getting.result()
    finally:
        getting.cancel()
    if listening.done():
        listening.result()
        raise Broken("the decode engine left before it had all pages")
    return None


def _part(batch: Batch, at: int) -> Batch:
    pages = batch.pages[at : at + BATCH_PAGES]
    return Batch(batch.token, batch.pool, batch.first + at, pages)


async def _send_pages(
    wire: Wire,
    batch: Batch,
    target: PeerSegment | None,
    rows: Mapping[tuple[int, int], int],
    sum_of: Callable[[memoryview, int], int] | None,
) -> None:
    """Send pages, or write them to the other side's memory. Raises Broken or ValueError"""
    sums = []
    if sum_of is not None:
        sums = [
            reduce(lambda told, piece: sum_of(piece.data, told), page, 0) for page in batch.pages
        ]
    said = Pages(batch.pool, batch.first, len(batch.pages), is_placed=target is not None, sums=sums)
    if target is None:
        await wire.send(said, [piece.data for page in batch.pages for piece in page])
        return
    for index, page in enumerate(batch.pages, start=batch.first):
        row, begin = target.row(batch.pool, rows[batch.pool, index]), 0
        for piece in page:
            np.copyto(row[begin : begin + len(piece)], piece)
            begin += len(piece)
    await wire.send(said)
