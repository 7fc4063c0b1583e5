"""Follows the KV events of workers, on a thread of its own. Needs pyzmq."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import zmq

from sapwood.gateway.kv_numbers import EventNumbers
from sapwood.gateway.policies.known_pages import KnownPages, PageSet
from sapwood.schema.kv_events import END_OF_REPLAY

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 16 << 20
MAX_WAITING = 10_000
"""Messages of one worker that have not been looked at; the rest is asked for again."""
REPLAY_LIMIT_S = 5.0

_END = END_OF_REPLAY.to_bytes(8, "big", signed=True)
_LOOK_MS = 500


@dataclass(frozen=True, slots=True)
class Source:
    """Where a cache's events come from, and where they can be asked for again, if anywhere."""

    endpoint: str
    replay_endpoint: str | None = None


class _Subscription:
    """The sockets of one source."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], source: Source, pages: PageSet):
        self.numbers = EventNumbers(pages, source.replay_endpoint is not None)
        self.source = source
        self.asked_s = 0.0
        self.has_complained = False
        self.events = context.socket(zmq.SUB)
        self.replay: zmq.Socket[bytes] | None = None
        self._configure(self.events)
        self.events.subscribe(b"")
        self.connections = self.events.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self.has_connected = False
        self.events.connect(source.endpoint)
        if source.replay_endpoint is not None:
            self.replay = context.socket(zmq.DEALER)
            self._configure(self.replay)
            self.replay.connect(source.replay_endpoint)
        self.ask(self.numbers.begin())

    @staticmethod
    def _configure(socket: zmq.Socket[bytes]) -> None:
        socket.linger = 0
        socket.rcvhwm = MAX_WAITING
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 5000)

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        return [one for one in (self.events, self.connections, self.replay) if one is not None]

    def ask(self, start: int | None) -> None:
        """Ask for messages from a number on; None: none are missing."""
        if start is None or self.replay is None:
            return
        self.asked_s = time.monotonic()
        with contextlib.suppress(zmq.Again):  # the time limit ends what cannot be asked
            self.replay.send_multipart([b"", start.to_bytes(8, "big")], zmq.NOBLOCK)

    def hear(self) -> None:
        for _ in _waiting(self.connections):
            if self.has_connected:  # and lost the connection since: it may be another engine now
                self.ask(self.numbers.begin())
            self.has_connected = True
        for frames in _waiting(self.events):
            if len(frames) == 3 and len(frames[1]) == 8:
                self.ask(self.numbers.take(int.from_bytes(frames[1], "big"), frames[2]))
        if self.replay is not None:
            for frames in _waiting(self.replay):
                if len(frames) != 3 or len(frames[1]) != 8:
                    continue
                if frames[1] == _END:
                    self.numbers.end_replay()
                else:
                    self.numbers.take_again(int.from_bytes(frames[1], "big"), frames[2])
        if self.numbers.is_behind and time.monotonic() > self.asked_s + REPLAY_LIMIT_S:
            self.numbers.end_replay()
        if self.numbers.num_bad and not self.has_complained:
            self.has_complained = True
            log.warning("what comes from %s are no KV events as known here", self.source.endpoint)

    def close(self) -> None:
        self.events.disable_monitor()
        for socket in self.sockets:
            socket.close()


def _waiting(socket: zmq.Socket[bytes]) -> list[list[bytes]]:
    """Messages that have come, but not so many that other sources wait long."""
    found = []
    with contextlib.suppress(zmq.Again):
        for _ in range(100):
            found.append(socket.recv_multipart(zmq.NOBLOCK))
    return found


class KVFollower:
    """Keeps `known` as the workers' events tell. All methods may be called by any thread."""

    def __init__(self, known: KnownPages) -> None:
        self.known = known
        self._orders: deque[tuple[str, Sequence[Source]]] = deque()
        self._by_worker: dict[str, list[_Subscription]] = {}
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._is_closing = False
        self._wakes, self._wake_end = os.pipe()
        os.set_blocking(self._wakes, False)
        os.set_blocking(self._wake_end, False)
        self._thread = threading.Thread(target=self._run, name="kv-follower", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> tuple[int, int]:
        """(events of the sources that are followed now, times that some were lost)"""
        numbers = [one.numbers for many in list(self._by_worker.values()) for one in many]
        return sum(one.num_events for one in numbers), sum(one.num_gaps for one in numbers)

    def follow(self, worker_id: str, sources: Sequence[Source]) -> None:
        """Follow a worker's caches, of which nothing is known; none: leave the worker."""
        self._orders.append((worker_id, sources))
        self._wake()

    def follow_endpoints(self, worker_id: str, endpoints: Sequence[tuple[str, str | None]]) -> None:
        self.follow(worker_id, [Source(*one) for one in endpoints])

    def leave(self, worker_id: str) -> None:
        self.known.end(worker_id)
        self.follow(worker_id, ())

    def close(self) -> None:
        if self._is_closing:
            return
        self._is_closing = True
        self._wake()
        self._thread.join()
        self._context.destroy(linger=0)
        os.close(self._wakes)
        os.close(self._wake_end)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_end, b"\0")

    def _run(self) -> None:
        while not self._is_closing:
            while self._orders:
                self._obey(*self._orders.popleft())
            poller = zmq.Poller()
            poller.register(self._wakes, zmq.POLLIN)
            heard = {}
            for subscription in [one for many in self._by_worker.values() for one in many]:
                for socket in subscription.sockets:
                    poller.register(socket, zmq.POLLIN)
                    heard[socket] = subscription
            while not self._orders and not self._is_closing:
                is_late = any(one.numbers.is_behind for one in heard.values())
                ready = [socket for socket, _ in poller.poll(_LOOK_MS if is_late else None)]
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wakes, 4096)
                for subscription in {heard[socket] for socket in ready if socket in heard}:
                    subscription.hear()
                if not ready:
                    for subscription in set(heard.values()):
                        subscription.hear()

    def _obey(self, worker_id: str, sources: Sequence[Source]) -> None:
        for old in self._by_worker.pop(worker_id, []):
            old.close()
        if not sources:
            self.known.end(worker_id)
            return
        sets = self.known.begin(worker_id, len(sources))
        made: list[_Subscription] = []
        try:
            for source, pages in zip(sources, sets, strict=True):
                made.append(_Subscription(self._context, source, pages))
        except zmq.ZMQError as error:
            log.warning("the KV events of %s cannot be followed: %s", source.endpoint, error)
            for one in made:
                one.close()
            self.known.end(worker_id)
            return
        self._by_worker[worker_id] = made
