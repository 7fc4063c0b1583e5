"""Publishes KV events over ZeroMQ, from a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from dataclasses import dataclass

import msgspec
import zmq

from sapwood.base.errors import ConfigError
from sapwood.schema.kv_events import (
    END_OF_REPLAY,
    AllBlocksCleared,
    KVEvent,
    KVEventBatch,
    KVEventsConfig,
    is_bound,
    of_rank,
)

log = logging.getLogger(__name__)

MOST_EVENTS_PER_MESSAGE = 1000
MOST_KEPT_BYTES = 64 << 20
"""Of messages that can be asked for again."""

_GATHER_S = 0.002  # A step stores many pages: they shall go in one message.
_LINGER_MS = 200
_MOST_ASKED_BYTES = 64  # A question for messages has 8.


@dataclass(frozen=True, slots=True)
class _Kept:
    number: bytes
    payload: bytes


class KVPublisher:
    """Sends events in their order. `put` belongs to one thread, `close` may be called by any.

    Whoever joins late, or misses messages, asks for them at the replay endpoint. A number that is
    missing there too says that events were dropped.

    num_published  events that were sent
    num_dropped    events for which there was no room; they are never sent
    """

    def __init__(self, config: KVEventsConfig, rank: int = 0) -> None:
        """Begins with an event that clears what is known of an engine here before.

        rank    number of the replica
        Raises  ConfigError if an endpoint cannot be had
        """
        self.num_published = 0
        self.num_dropped = 0
        self._topic = config.topic.encode()
        self._rank = rank
        self._max_waiting = config.max_queue_size
        self._waiting: deque[KVEvent] = deque()
        self._has_lost = False
        self._sleeps = False
        self._is_closing = False
        self._encode = msgspec.msgpack.Encoder().encode
        self._next = 0
        self._kept: deque[_Kept] = deque()
        self._kept_bytes = 0
        self._most_kept = config.buffer_steps
        self._context = zmq.Context()
        self._context.setsockopt(zmq.LINGER, _LINGER_MS)
        try:
            self._events = self._context.socket(zmq.PUB)
            self._events.set_hwm(config.hwm)
            _open(self._events, of_rank(config.endpoint, rank))
            self._questions: zmq.Socket[bytes] | None = None
            if config.replay_endpoint is not None:
                self._questions = self._context.socket(zmq.ROUTER)
                self._questions.set(zmq.MAXMSGSIZE, _MOST_ASKED_BYTES)
                self._questions.sndhwm = config.buffer_steps + 1
                _open(self._questions, of_rank(config.replay_endpoint, rank))
        except ConfigError:
            self._context.destroy(linger=0)
            raise
        self._wakes, self._wake_end = os.pipe()
        os.set_blocking(self._wakes, False)
        os.set_blocking(self._wake_end, False)
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self.put(AllBlocksCleared())
        self._thread.start()

    def put(self, event: KVEvent) -> None:
        """Have the event sent soon. Never waits: without room the event is dropped."""
        if len(self._waiting) >= self._max_waiting:
            if not self.num_dropped:
                log.warning(
                    "KV events are dropped: %d wait already; a larger max_queue_size in "
                    "--kv-events-config keeps more",
                    self._max_waiting,
                )
            self.num_dropped += 1
            self._has_lost = True
            return
        self._waiting.append(event)
        if self._sleeps:
            self._wake()

    def close(self) -> None:
        """Send what waits, and end. May be called twice."""
        if self._is_closing:
            return
        self._is_closing = True
        self._wake()
        self._thread.join()
        self._context.destroy()
        os.close(self._wakes)
        os.close(self._wake_end)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it will wake anyhow
            os.write(self._wake_end, b"\0")

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wakes, zmq.POLLIN)
        if self._questions is not None:
            poller.register(self._questions, zmq.POLLIN)
        while True:
            is_closing = self._is_closing  # read first: what was put before is sent
            while self._waiting:
                self._send()
            if is_closing:
                return
            self._sleeps = True
            ready = poller.poll(0 if self._waiting else None)
            self._sleeps = False
            for source, _ in ready:
                if source is self._questions:
                    self._answer()
                else:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wakes, 4096)
                    if not self._is_closing:
                        time.sleep(_GATHER_S)

    def _send(self) -> None:
        """Send one message with what waits."""
        if self._has_lost:
            self._has_lost = False
            self._next += 1  # nobody will ever get that number
        count = min(len(self._waiting), MOST_EVENTS_PER_MESSAGE)
        events = [self._waiting.popleft() for _ in range(count)]
        payload = self._encode(KVEventBatch(time.time(), events, self._rank))
        number = self._next.to_bytes(8, "big")
        self._next += 1
        self._events.send_multipart([self._topic, number, payload])
        self.num_published += count
        if self._questions is None:
            return
        self._kept.append(_Kept(number, payload))
        self._kept_bytes += len(payload)
        while len(self._kept) > self._most_kept or self._kept_bytes > MOST_KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popleft().payload)

    def _answer(self) -> None:
        """Send the kept messages from the asked number on to the one who asks."""
        assert self._questions is not None
        asker, *rest = self._questions.recv_multipart()
        if len(rest) != 2 or rest[0] or len(rest[1]) != 8:
            return  # no question of this protocol
        for kept in self._kept:
            if kept.number >= rest[1]:  # in big-endian the bytes are in the numbers' order
                self._questions.send_multipart([asker, b"", kept.number, kept.payload])
        end = END_OF_REPLAY.to_bytes(8, "big", signed=True)
        self._questions.send_multipart([asker, b"", end, b""])


def _open(socket: zmq.Socket[bytes], endpoint: str) -> None:
    try:
        if is_bound(endpoint):
            socket.bind(endpoint)
        else:
            socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise ConfigError(
            f"the endpoint {endpoint} of --kv-events-config cannot be used: {error}; choose "
            "another one"
        ) from error
