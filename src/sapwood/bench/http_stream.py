"""A minimal HTTP/1.1 client that streams, made to leave the cores to the server under test.

Measured with 64 streams of 20 events a second each, on a 2-core machine: httpx takes 14% of a core
(109 us an event, most of it in layers that a benchmark does not need: pooling, redirects,
decoding), asyncio's stream reader 5 to 6%, this protocol with all the benchmark's bookkeeping 5%,
and 3% on uvloop. A client that shares two cores with the server changes what it measures, so it
must stay well below a tenth of one. One connection serves one request; its set-up is part of the
measured time, as it is for a new user.

What it reads: status line, headers, bodies with a length, in chunks, or up to the end of the
connection; server-sent events (WHATWG HTML, section 9.2). What it refuses: compressed bodies, which
it does not ask for, and redirects.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import cast
from urllib.parse import urlsplit

from sapwood.base.errors import ConfigError

MAX_HEAD_BYTES = 64 * 1024
MAX_LINE_BYTES = 1024


class HttpError(Exception):
    """The exchange failed: no connection, a status other than 200, or bytes that are not HTTP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a server listens. base_path has no slash at its end."""

    host: str
    port: int
    tls: bool
    base_path: str

    @classmethod
    def parse(cls, url: str) -> Endpoint:
        """From "http://host:port/base"; ConfigError if it is not such a URL."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"--url is {url!r}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url is {url!r} but must be like http://127.0.0.1:30000")
        tls = parts.scheme == "https"
        return cls(
            host=parts.hostname,
            port=port or (443 if tls else 80),
            tls=tls,
            base_path=parts.path.rstrip("/"),
        )

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.base_path}"


class _Body(Enum):
    UNKNOWN = "unknown"
    LENGTH = "length"
    CHUNK_SIZE = "chunk size"
    CHUNK_DATA = "chunk data"
    CHUNK_END = "chunk end"
    TRAILER = "trailer"
    UNTIL_CLOSE = "until close"
    COMPLETE = "complete"


class ResponseParser:
    """Bytes of one response, in pieces of any size, to its status and body. Does no I/O."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._buffer = bytearray()
        self._state = _Body.UNKNOWN
        self._left = 0

    @property
    def complete(self) -> bool:
        return self._state is _Body.COMPLETE

    def feed(self, data: bytes) -> bytes:
        """The body bytes that `data` completes; HttpError if this is no HTTP response."""
        self._buffer += data
        body = bytearray()
        while not self.complete and self._advance(body):
            pass
        return bytes(body)

    def end(self) -> None:
        """The connection is closed; HttpError if the response is not whole."""
        if self._state is _Body.UNTIL_CLOSE:
            self._state = _Body.COMPLETE
        if not self.complete:
            raise HttpError("the server closed the connection before its answer was whole")

    def _advance(self, body: bytearray) -> bool:
        """One step of the state machine; False if it needs more bytes."""
        match self._state:
            case _Body.UNKNOWN:
                return self._read_head()
            case _Body.CHUNK_SIZE:
                return self._read_chunk_size()
            case _Body.LENGTH | _Body.CHUNK_DATA:
                return self._read_data(body)
            case _Body.UNTIL_CLOSE:
                body += self._buffer
                self._buffer.clear()
                return False
            case _Body.CHUNK_END:
                return self._read_chunk_end()
            case _:
                return self._read_trailer()

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise HttpError(f"the answer's head is longer than {MAX_HEAD_BYTES} bytes")
            return False
        lines = self._buffer[:end].decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        version, _, rest = lines[0].partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise HttpError(f"the answer begins with {lines[0][:80]!r}, which is not HTTP/1")
        status = int(rest[:3])
        if 100 <= status < 200:
            return True  # An interim answer, such as 100 Continue; the real one follows.
        self.status = status
        for line in lines[1:]:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        self._choose_framing()
        return True

    def _choose_framing(self) -> None:
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._state = _Body.CHUNK_SIZE
        elif "content-length" in self.headers:
            length = self.headers["content-length"]
            if not length.isdigit():
                raise HttpError(f"the answer's content-length is {length!r}")
            self._left = int(length)
            self._state = _Body.LENGTH if self._left else _Body.COMPLETE
        else:
            self._state = _Body.UNTIL_CLOSE

    def _take_line(self) -> bytes | None:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if len(self._buffer) > MAX_LINE_BYTES:
                raise HttpError("a chunk of the answer has no size")
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line

    def _read_chunk_size(self) -> bool:
        line = self._take_line()
        if line is None:
            return False
        try:
            self._left = int(line.split(b";")[0], 16)
        except ValueError as error:
            raise HttpError(f"a chunk of the answer has the size {line[:40]!r}") from error
        self._state = _Body.CHUNK_DATA if self._left else _Body.TRAILER
        return True

    def _read_data(self, body: bytearray) -> bool:
        if not self._buffer:
            return False
        taken = self._buffer[: self._left]
        del self._buffer[: len(taken)]
        body += taken
        self._left -= len(taken)
        if self._left == 0:
            in_chunks = self._state is _Body.CHUNK_DATA
            self._state = _Body.CHUNK_END if in_chunks else _Body.COMPLETE
        return True

    def _read_chunk_end(self) -> bool:
        line = self._take_line()
        if line is None:
            return False
        if line:
            raise HttpError("a chunk of the answer is longer than its size")
        self._state = _Body.CHUNK_SIZE
        return True

    def _read_trailer(self) -> bool:
        line = self._take_line()
        if line is None:
            return False
        if not line:
            self._state = _Body.COMPLETE
        return True


class SseParser:
    """Bytes of an event stream to the data of its events. Does no I/O."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that `data` completes; comments and other fields are left out."""
        self._buffer += data
        events = []
        end = self._buffer.rfind(b"\n")
        if end < 0:
            return []
        lines = bytes(self._buffer[:end]).split(b"\n")
        del self._buffer[: end + 1]
        for raw in lines:
            line = raw.rstrip(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events


BodyHandler = Callable[[ResponseParser, bytes], None]


class _Exchange(asyncio.Protocol):
    """One request and its answer over one connection."""

    def __init__(self, request: bytes, on_body: BodyHandler, done: asyncio.Future[None]) -> None:
        self._request = request
        self._on_body = on_body
        self._done = done
        self.parser = ResponseParser()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, no check: uvloop's transports do not inherit from asyncio's.
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        if self._done.done():
            return
        try:
            body = self.parser.feed(data)
            if body:
                self._on_body(self.parser, body)
        except Exception as error:  # noqa: BLE001 - handed to the caller, who awaits `done`
            self._finish(error)
            return
        if self.parser.complete:
            self._finish(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done.done():
            return
        try:
            if exc is not None:
                raise HttpError(f"the connection broke: {exc}") from exc
            self.parser.end()
        except HttpError as error:
            self._finish(error)
            return
        self._finish(None)

    def _finish(self, error: Exception | None) -> None:
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)


async def exchange(
    endpoint: Endpoint,
    method: str,
    path: str,
    *,
    body: bytes | None,
    headers: Mapping[str, str],
    on_body: BodyHandler,
    timeout_s: float,
) -> ResponseParser:
    """Send one request; `on_body` is called in the event loop as body bytes arrive.

    Raises HttpError if there is no whole answer within `timeout_s`, and whatever `on_body` raises.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    request = _head(endpoint, method, path, body, headers) + (body or b"")
    transport: asyncio.BaseTransport | None = None
    try:
        async with asyncio.timeout(timeout_s):
            transport, protocol = await loop.create_connection(
                lambda: _Exchange(request, on_body, done),
                endpoint.host,
                endpoint.port,
                ssl=endpoint.tls or None,
            )
            await done
    except TimeoutError as error:
        raise HttpError(f"no whole answer within {timeout_s:g} s") from error
    except OSError as error:
        raise HttpError(f"cannot connect to {endpoint}: {error}") from error
    finally:
        if transport is not None:
            transport.close()
    return protocol.parser


async def fetch_json(
    endpoint: Endpoint,
    method: str,
    path: str,
    *,
    body: object = None,
    headers: Mapping[str, str],
    timeout_s: float,
) -> object:
    """The JSON of an answer; HttpError for any status but 200, with what the server said."""
    received = bytearray()
    answer = await exchange(
        endpoint,
        method,
        path,
        body=None if body is None else json.dumps(body).encode(),
        headers=headers,
        on_body=lambda _, data: received.extend(data),
        timeout_s=timeout_s,
    )
    if answer.status != 200:
        raise HttpError(status_message(answer.status, bytes(received)))
    try:
        return json.loads(received)
    except ValueError as error:
        raise HttpError(f"{path} answered with something other than JSON: {error}") from error


def status_message(status: int, body: bytes) -> str:
    """What a refused request is told: the message of a JSON error body, else the body's start."""
    text = body.decode("utf-8", "replace").strip()
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, dict):
        text = str(error_text(value) or text)
    return f"HTTP {status}: {text[:300] or 'no message'}"


def error_text(value: Mapping[str, object]) -> object:
    """The message in an error body: OpenAI's {"error": {"message"}}, or a flat {"message"}."""
    error = value.get("error")
    if isinstance(error, dict):
        return error.get("message") or error
    return error or value.get("message") or value.get("detail")


def _head(
    endpoint: Endpoint, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
) -> bytes:
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    lines = [
        f"{method} {endpoint.base_path}{path} HTTP/1.1",
        f"host: {host}:{endpoint.port}",
        "connection: close",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    if body is not None:
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
