"""uvicorn with TLS, limits on slow clients, and a drain on a signal."""

from __future__ import annotations

import asyncio
import functools
import logging
import ssl
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sapwood.base.errors import ConfigError
from sapwood.http.access import Access
from sapwood.http.callers import Callers
from sapwood.http.known_hosts import is_loopback
from sapwood.schema.config.listening import ListeningConfig

AFTER_DRAIN_S = 5
"""Seconds after the drain limit when the connections of open requests are cut."""
MAX_HEAD_BYTES = 64 << 10
"""Bytes of a request line and all headers together."""
_TOO_LONG = b"the request line and the headers have more than 65536 bytes\n"
HEAD_TOO_LONG = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-type: text/plain; charset=utf-8\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%s" % (len(_TOO_LONG), _TOO_LONG)
)


class HttpServer(uvicorn.Server):
    """A signal also drains the engine, so that open requests get a finish when time is up."""

    def __init__(self, app: ASGIApp, config: ListeningConfig, drain: Callable[[], None]) -> None:
        """The server for `app`; ConfigError if the TLS files cannot be used."""
        super().__init__(_uvicorn_config(below(app, config.root_path), config))
        self._drain = drain
        if config.logs_access:
            access = logging.getLogger("uvicorn.access")
            access.setLevel(logging.INFO)
            access.addFilter(AccessFilter(config.unlogged_paths))

    def handle_exit(self, sig: int, frame: FrameType | None = None) -> None:
        self._drain()
        super().handle_exit(sig, frame)

    def stop(self) -> None:
        """End without waiting for a signal."""
        self.should_exit = True

    async def listens(self) -> None:
        """Wait until it takes connections: uvicorn does not say when."""
        while not self.started:
            await asyncio.sleep(0.01)

    @property
    def url(self) -> str:
        scheme = "https" if self.config.is_ssl else "http"
        for server in self.servers:
            for socket in server.sockets:
                host, port = socket.getsockname()[:2]
                return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        return f"{scheme}://{self.config.host}:{self.config.port}"


class AccessFilter(logging.Filter):
    """Leaves out the requests of some paths, and of all below them."""

    def __init__(self, prefixes: tuple[str, ...]) -> None:
        super().__init__()
        self._prefixes = prefixes

    def filter(self, record: logging.LogRecord) -> bool:
        args = record.args
        path = args[2] if isinstance(args, tuple) and len(args) > 2 else None
        return not (isinstance(path, str) and self._prefixes and path.startswith(self._prefixes))


def below(app: ASGIApp, root_path: str) -> ASGIApp:
    """The app under `root_path` too: what is in front of a path is taken off before anything else
    looks at it, so that access is decided by the route that answers."""
    if not root_path:
        return app
    prefix = f"{root_path}/"

    async def under_root(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path.startswith(prefix):
            raw = scope.get("raw_path") or path.encode()
            cut = len(root_path.encode())
            known = raw.startswith(prefix.encode())
            scope = {**scope, "path": path[len(root_path) :]}
            scope["raw_path"] = raw[cut:] if known else scope["path"].encode()
        await app(scope, receive, send)

    return under_root


class ImpatientProtocol(HttpToolsProtocol):
    """Closes a connection whose request head does not arrive in time or is too long.

    uvicorn's own limit is on silence between two requests: a client that sends a byte now and then,
    or nothing at all, could otherwise hold its connection for ever, or fill the memory with a head.
    """

    def __init__(self, *args: Any, head_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timeout_s = head_timeout_s
        self._head_timer: asyncio.TimerHandle | None = None
        self._waits_since_s: float | None = None
        self._num_head_bytes = 0
        self._reads_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head(0)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head(len(data))

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._reads_body = True

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._reads_body = False

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_head(0)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def _watch_head(self, num_bytes: int) -> None:
        """Begin to wait for a request, or end it; single bytes do not delay the wait's end.

        The timer is not stopped when a request has arrived: one per request would cost more than it
        does to look now and then.
        """
        if self.cycle is not None and not self.cycle.response_complete:
            self._num_head_bytes = 0
            self._waits_since_s = None
            return
        if not self._reads_body:  # the rest of a body that the answer did not wait for
            self._num_head_bytes += num_bytes
        if self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(HEAD_TOO_LONG)
            self.transport.close()
        elif self._waits_since_s is None and self._head_timeout_s > 0:
            self._waits_since_s = self.loop.time()
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(self._head_timeout_s, self._check_head)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _check_head(self) -> None:
        self._head_timer = None
        if self._waits_since_s is None or self.transport.is_closing():
            return
        left_s = self._waits_since_s + self._head_timeout_s - self.loop.time()
        if left_s > 0:
            self._head_timer = self.loop.call_later(left_s, self._check_head)
        else:
            self.transport.close()


def access_of(server: ListeningConfig, callers: tuple[Callers, ...] = ()) -> Access:
    """The access to the server that its options describe.

    callers  know those with keys of their own
    """
    # A page that has rebound its name brings no key, and no certificate of that name. Where pages
    # of all origins are allowed, it needs no such trick.
    is_safe = (
        server.api_key is not None
        or bool(callers)
        or server.ssl_certfile is not None
        or "*" in server.allowed_origins
    )
    is_local = is_loopback(server.host)
    return Access(
        api_key=server.api_key,
        admin_api_key=server.admin_api_key,
        callers=callers,
        allowed_origins=server.allowed_origins,
        allowed_hosts=("*",) if is_safe else (*server.host_names, server.host),
        is_local=is_local,
        refuses_open_admin=not (is_local or server.allow_open_admin),
    )


def _uvicorn_config(app: ASGIApp, config: ListeningConfig) -> uvicorn.Config:
    protocol: Any = functools.partial(
        ImpatientProtocol, head_timeout_s=config.request_header_timeout
    )
    made = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        http=protocol,
        log_config=None,
        access_log=config.logs_access,
        log_level="warning",
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=int(config.drain_timeout) + AFTER_DRAIN_S,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile_password=config.ssl_keyfile_password,
        ssl_ca_certs=config.ssl_ca_certs,
        ssl_cert_reqs=ssl.CERT_REQUIRED if config.ssl_ca_certs else ssl.CERT_NONE,
    )
    try:
        made.load()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"the TLS files cannot be used: {error}; see --ssl-certfile, --ssl-keyfile, "
            "--ssl-keyfile-password and --ssl-ca-certs"
        ) from error
    return made
