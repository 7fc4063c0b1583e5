"""Typed messages between the API process and an engine: over ZMQ, or a queue in one process.

Messages are msgspec structs. A sender never blocks; a receiver returns all that has arrived.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, Protocol, TypeVar

import msgspec
import zmq
import zmq.asyncio

log = logging.getLogger(__name__)

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class Sender(Protocol[T_contra]):
    def send(self, message: T_contra) -> None: ...


class Receiver(Protocol[T]):
    def receive(self, timeout_s: float | None) -> list[T]:
        """All messages that have arrived; waits `timeout_s` (None: for ever) for the first."""
        ...


class CallbackSender(Generic[T]):
    """Hands each message to a function, which may pass it on to another thread's event loop."""

    def __init__(self, deliver: Callable[[T], None]) -> None:
        self._deliver = deliver

    def send(self, message: T) -> None:
        self._deliver(message)


class QueueChannel(Generic[T]):
    """Sender and receiver within one process; any thread may send, one thread receives."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[T] = queue.SimpleQueue()

    def send(self, message: T) -> None:
        self._queue.put(message)

    def receive(self, timeout_s: float | None) -> list[T]:
        messages: list[T] = []
        try:
            if timeout_s is None or timeout_s > 0:
                messages.append(self._queue.get(timeout=timeout_s))
            while True:
                messages.append(self._queue.get_nowait())
        except queue.Empty:
            return messages


class ZmqSender(Generic[T]):
    """Binds or connects a PUSH socket; there is no limit on what may wait to be sent.

    A message to a process that is gone is dropped: nobody could receive it, and whoever watches
    that process reports its end.
    """

    def __init__(self, address: str, *, bind: bool) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 1000)
        _attach(self._socket, address, bind=bind)
        self._encoder = msgspec.msgpack.Encoder()

    @property
    def address(self) -> str:
        """Where the other side finds a bound socket, also if the system has chosen the port."""
        return _address_of(self._socket)

    def send(self, message: T) -> None:
        try:
            self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            log.debug("dropped a %s: nobody is connected", type(message).__name__)

    def close(self) -> None:
        self._socket.close()


class ZmqReceiver(Generic[T]):
    """Binds or connects a PULL socket; `messages` is the union of the types that may come."""

    def __init__(self, address: str, messages: object, *, bind: bool) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        _attach(self._socket, address, bind=bind)
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(messages)

    def listen(self, address: str) -> None:
        """Take messages from this address, too."""
        _attach(self._socket, address, bind=True)

    def receive(self, timeout_s: float | None) -> list[T]:
        messages: list[T] = []
        timeout_ms = None if timeout_s is None else int(timeout_s * 1000)
        if timeout_ms != 0 and not self._socket.poll(timeout_ms):
            return messages
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            messages.append(self._decoder.decode(frame))

    def close(self) -> None:
        self._socket.close()


class AsyncZmqReceiver(Generic[T]):
    """The receiver of an asyncio program."""

    def __init__(self, address: str, messages: object, *, bind: bool) -> None:
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        _attach(self._socket, address, bind=bind)
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(messages)

    @property
    def address(self) -> str:
        """As that of a sender."""
        return _address_of(self._socket)

    async def messages(self) -> AsyncIterator[T]:
        while True:
            yield self._decoder.decode(await self._socket.recv())

    def close(self) -> None:
        self._socket.close()


def _attach(socket: zmq.Socket[Any], address: str, *, bind: bool) -> None:
    if bind:
        socket.bind(address)
    else:
        socket.connect(address)


def _address_of(socket: zmq.Socket[Any]) -> str:
    address = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(address, bytes), "as ZMQ says"
    return address.rstrip(b"\0").decode()
