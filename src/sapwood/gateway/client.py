"""A pooled HTTP/1.1 client for workers, whose answers are passed on byte by byte.

The gateway's work for a short request is mostly its client's. This one is an asyncio protocol
around httptools, the parser that uvicorn uses as well: it keeps connections open, copies header
names and values as they are, hands on the body's bytes as they come, and does nothing else. What
it costs beside other clients is measured in docs/gateway.md.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from sapwood.base.errors import ConfigError, InvalidRequest

MAX_HEAD_BYTES = 64 << 10
MAX_BUFFERED_BYTES = 256 << 10
"""Bytes of an answer that may wait for a slow client before the worker is made to wait too."""
MAX_IDLE_S = 30.0
"""Connections that were idle for longer are not used again: the worker may have forgotten them."""
MAX_IDLE_CONNECTIONS = 256


class WorkerFailure(Exception):
    """A worker gave no whole answer."""


class NotConnected(WorkerFailure):
    """No connection to the worker could be opened."""


class ConnectionBroken(WorkerFailure):
    """The connection ended before the answer did, or its bytes are no HTTP."""


class ConnectionClosed(ConnectionBroken):
    """The worker closed the connection before the first byte of its answer."""


class PeerFailure(WorkerFailure):
    """Another worker failed, without which this one's answer cannot be whole."""


class NotInTime(WorkerFailure):
    """The worker was silent for too long."""


def tls_context(ca_certs: str | None, certfile: str | None, keyfile: str | None) -> ssl.SSLContext:
    """What TLS to all workers has in common. ConfigError if a file cannot be used.

    ca_certs  PEM file of the authorities to trust; None: the machine's own
    certfile, keyfile  certificate of the gateway, and its key; None: it brings none
    """
    try:
        context = ssl.create_default_context(cafile=ca_certs)
        if certfile is not None:
            context.load_cert_chain(certfile, keyfile)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"the files for TLS to workers cannot be used: {error}; see --worker-ca-certs, "
            "--worker-certfile and --worker-keyfile"
        ) from error
    return context


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a worker listens. base_path has no slash at its end.

    is_rpc  whether it speaks gRPC
    """

    host: str
    port: int
    tls: bool
    base_path: bytes
    is_rpc: bool = False

    @classmethod
    def parse(cls, url: str) -> Origin:
        """From "http://host:port/base" or "grpc://host:port"; InvalidRequest if it is not such a
        URL."""
        wrong = (
            f"the worker's url is {url[:200]!r} but must be like http://10.0.0.7:30000, or "
            "grpc://10.0.0.7:30000"
        )
        try:
            parts = urlsplit(url)
            port = parts.port
            path = parts.path.rstrip("/").encode("ascii")
            parts.netloc.encode("ascii")
        except ValueError:  # bad ports, and names that are not ASCII
            raise InvalidRequest(wrong, param="url") from None
        if (
            parts.scheme not in ("http", "https", "grpc", "grpcs")
            or not parts.hostname
            or parts.username
        ):
            raise InvalidRequest(wrong, param="url")
        if parts.query or parts.fragment or not url.isprintable() or " " in url:
            raise InvalidRequest(wrong, param="url")
        tls = parts.scheme in ("https", "grpcs")
        is_rpc = parts.scheme.startswith("grpc")
        if is_rpc and (path or not port):
            raise InvalidRequest(wrong, param="url")
        return cls(parts.hostname, port or (443 if tls else 80), tls, path, is_rpc)

    @property
    def host_header(self) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        is_usual = self.port == (443 if self.tls else 80)
        return (host if is_usual else f"{host}:{self.port}").encode("ascii")


class Answer:
    """A worker's answer, as far as it has come; the callbacks of httptools fill it.

    status   0 until the head has come
    headers  names in lower case, in the worker's order
    """

    __slots__ = (
        "_buffered",
        "_connection",
        "_failure",
        "_head_bytes",
        "_parser",
        "_pieces",
        "_waiter",
        "has_length",
        "headers",
        "is_complete",
        "is_surplus",
        "keep_alive",
        "status",
    )

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._buffered = 0
        self._head_bytes = 0
        self._failure: WorkerFailure | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.has_length = False
        self.is_complete = False
        self.is_surplus = False
        self.keep_alive = False

    # Callbacks of httptools.

    def on_message_begin(self) -> None:
        if self.is_complete:
            self.is_surplus = True
            # Ends the parsing: these bytes must not become part of this answer, nor of the next.
            raise ConnectionBroken("the worker sent more than was asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ConnectionBroken(f"the answer's head has more than {MAX_HEAD_BYTES} bytes")
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self.has_length = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200:
            self.status = status

    def on_body(self, data: bytes) -> None:
        self._pieces.append(data)
        self._buffered += len(data)

    def on_message_complete(self) -> None:
        if self.status == 0:  # an interim answer, such as 100 Continue
            self.headers = []
            return
        self.keep_alive = self._parser.should_keep_alive()
        self.is_complete = True

    # For the connection.

    def feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
            if self.status == 0:
                self._head_bytes += len(data)
                if self._head_bytes > MAX_HEAD_BYTES:
                    raise ConnectionBroken(f"there is no head in {MAX_HEAD_BYTES} bytes")
        except httptools.HttpParserCallbackError as error:
            self.fail(ConnectionBroken(str(error.__context__ or error)))
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.fail(ConnectionBroken(f"the answer is no HTTP: {error}"))
        except ConnectionBroken as error:
            self.fail(error)
        self.wake()

    def end_of_connection(self) -> None:
        if self.is_complete:
            return
        if self.status and not self.has_length:
            self.is_complete = True
            self.wake()
            return
        if self._head_bytes == 0:
            self.fail(ConnectionClosed("the worker closed the connection before its answer"))
        else:
            self.fail(ConnectionBroken("the worker closed the connection within its answer"))

    def fail(self, failure: WorkerFailure) -> None:
        """Ends the answer, unless it is complete: who waits for it gets the failure."""
        if self.is_complete or self._failure is not None:
            return
        self._failure = failure
        self.wake()
        self._connection.abort()

    def wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    @property
    def is_too_far_ahead(self) -> bool:
        return self._buffered > MAX_BUFFERED_BYTES

    # For who reads the answer.

    async def head(self) -> None:
        """Returns when the status and the headers are there; WorkerFailure if they never come."""
        while self.status == 0:
            await self.more()

    async def more(self) -> None:
        """Returns when there is something to take; WorkerFailure if the answer has failed."""
        while not self._pieces and not self.is_complete:
            if self._failure is not None:
                raise self._failure
            self._waiter = self._connection.loop.create_future()
            has_head = self.status != 0
            try:
                await self._waiter
            finally:
                self._waiter = None
            if self.status and not has_head:
                return

    def take(self) -> bytes:
        """The body's bytes that have come since the last call; b"" for none."""
        pieces = self._pieces
        if not pieces:
            return b""
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._pieces = []
        if self.is_too_far_ahead:
            self._connection.resume()
        self._buffered = 0
        return data

    async def body(self, max_bytes: int) -> bytes:
        """The whole body; WorkerFailure if it fails, or has more bytes."""
        read = bytearray()
        while True:
            is_complete = self.is_complete
            read += self.take()
            if len(read) > max_bytes:
                raise ConnectionBroken(f"the answer has more than {max_bytes} bytes")
            if is_complete:
                return bytes(read)
            await self.more()

    def watch(self, idle_s: float) -> None:
        """From now on the answer fails if nothing of it comes for that many seconds."""
        self._connection.watch(idle_s)

    def close(self) -> None:
        """Give the connection back; it ends if the answer is not complete, and so the request."""
        self._connection.release(self)


class Connection(asyncio.Protocol):
    """One connection to a worker, for one request at a time."""

    def __init__(self, pool: Pool) -> None:
        self.loop = pool.loop
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._last_byte_s = 0.0
        self._is_paused = False
        self.idle_since_s = 0.0
        self.was_used = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, no check: uvloop's transports do not inherit from asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:  # nobody has asked for these bytes
            self.abort()
            return
        self._last_byte_s = self.loop.time()
        answer.feed(data)
        if answer.is_too_far_ahead and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._stop_timer()
        self._pool.forget(self)
        if self._answer is not None:
            self._answer.end_of_connection()

    def ask(self, request: Sequence[bytes]) -> Answer:
        """Send a request; the pieces are written as they are."""
        assert self._transport is not None
        assert self._answer is None
        self._answer = Answer(self)
        self._transport.writelines(request)
        return self._answer

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def release(self, answer: Answer) -> None:
        if self._answer is not answer:
            return
        self._answer = None
        self._stop_timer()
        can_be_used_again = answer.is_complete and answer.keep_alive and not answer.is_surplus
        if can_be_used_again and self.is_open:
            self.resume()
            self.was_used = True
            self.idle_since_s = self.loop.time()
            self._pool.keep(self)
        else:
            self.abort()

    def resume(self) -> None:
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._last_byte_s = self.loop.time()
            self._transport.resume_reading()

    def abort(self) -> None:
        self._stop_timer()
        self._pool.forget(self)
        if self._transport is not None:
            # Not close: that would wait until the rest of the request is sent.
            self._transport.abort()

    def watch(self, idle_s: float) -> None:
        if idle_s > 0 and self._timer is None:
            self._last_byte_s = self.loop.time()
            self._timer = self.loop.call_later(idle_s, self._check_idle, idle_s)

    def _check_idle(self, idle_s: float) -> None:
        """One timer per answer, not per piece of it."""
        self._timer = None
        if self._answer is None:
            return
        # A client that does not read what has come is no failure of the worker.
        left_s = idle_s if self._is_paused else self._last_byte_s + idle_s - self.loop.time()
        if left_s > 0:
            self._timer = self.loop.call_later(left_s, self._check_idle, idle_s)
        else:
            self._answer.fail(NotInTime(f"nothing more came from the worker for {idle_s:g} s"))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Pool:
    """The connections to one worker, which are kept open between requests."""

    def __init__(
        self, origin: Origin, *, connect_timeout_s: float, tls: ssl.SSLContext | None = None
    ) -> None:
        """A pool without connections.

        tls  whom to trust, and by which certificate to be known, if the origin speaks TLS; None:
             whom the machine trusts, and none
        """
        self.loop = asyncio.get_running_loop()
        self.origin = origin
        self._connect_timeout_s = connect_timeout_s
        self._tls = (tls or ssl.create_default_context()) if origin.tls else None
        self._idle: dict[Connection, None] = {}
        self._open: set[Connection] = set()

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    async def ask(
        self, head: bytes, body: bytes = b"", *, on_sent: Callable[[Answer], None] | None = None
    ) -> Answer:
        """Send a request and wait for the head of its answer; WorkerFailure if none comes.

        Workers close connections that were idle for some seconds. If that happens while a request
        is on its way, it goes out again on a new connection: the worker has not read it.

        on_sent  gets each answer before its head has come, so that others can let it fail
        """
        request = (head, body) if body else (head,)
        connection = self._idle_connection()
        if connection is not None:
            answer = connection.ask(request)
            try:
                return await self._head_of(answer, on_sent)
            except ConnectionClosed:
                pass  # goes on below
        return await self._head_of((await self._connect()).ask(request), on_sent)

    async def _head_of(self, answer: Answer, on_sent: Callable[[Answer], None] | None) -> Answer:
        if on_sent is not None:
            on_sent(answer)
        try:
            await answer.head()
        except BaseException:
            answer.close()
            raise
        return answer

    def keep(self, connection: Connection) -> None:
        if len(self._idle) >= MAX_IDLE_CONNECTIONS:
            connection.abort()
        else:
            self._idle[connection] = None

    def forget(self, connection: Connection) -> None:
        self._idle.pop(connection, None)
        self._open.discard(connection)

    def close(self) -> None:
        """End all connections; their requests fail."""
        for connection in list(self._open):
            connection.abort()

    def _idle_connection(self) -> Connection | None:
        """The connection that was used last, which the worker is least likely to have closed."""
        while self._idle:
            connection, _ = self._idle.popitem()
            if connection.is_open and self.loop.time() - connection.idle_since_s < MAX_IDLE_S:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> Connection:
        origin = self.origin
        options: dict[str, Any] = {"ssl": self._tls} if self._tls is not None else {}
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await self.loop.create_connection(
                    lambda: Connection(self), origin.host, origin.port, **options
                )
        except TimeoutError:
            raise NotConnected(
                f"the worker accepted no connection within {self._connect_timeout_s:g} s"
            ) from None
        except OSError as error:
            raise NotConnected(f"no connection to the worker: {error}") from error
        self._open.add(connection)
        return connection
