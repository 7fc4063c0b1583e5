"""gRPC's server in the place of the HTTP server: TLS, limits, and a drain on a signal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

import grpc

from sapwood.app.serving.http_server import AFTER_DRAIN_S
from sapwood.base.errors import ConfigError
from sapwood.frontends.grpc.calls import handlers
from sapwood.frontends.grpc.service import SchedulerService
from sapwood.frontends.serving.services import Services
from sapwood.http.auth import ServerKeys
from sapwood.rpc.methods import KEEPALIVE_MS, MAX_ANSWER_BYTES
from sapwood.schema.config.server import ServerConfig

MAX_OPEN_CALLS = 16_384
"""Of one connection; a router sends all its requests by one."""
DEAD_AFTER_MS = 30_000
"""A client that answers no ping for so long is gone, and its requests are aborted."""

LAST_WORDS_S = 1.0
"""How long the last messages may take to their clients."""
LOOK_S = 0.02


class GrpcServer:
    """Serves the engine's gRPC service until a signal, and drains as the HTTP server does.

    To be made in a running event loop. ConfigError if it cannot listen as the options say.
    """

    def __init__(
        self,
        services: Services,
        config: ServerConfig,
        drain: Callable[[], None],
        *,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        self._services = services
        self._config = config
        self._drain = drain
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._hurried = asyncio.Event()
        self._service = SchedulerService(services, eos_token_ids)
        keys = ServerKeys(api_key=config.api_key, admin_api_key=config.admin_api_key)
        self._server = grpc.aio.server(
            handlers=handlers(services, self._service, keys),
            options=[
                ("grpc.max_receive_message_length", config.max_request_bytes),
                ("grpc.max_send_message_length", MAX_ANSWER_BYTES),
                ("grpc.max_concurrent_streams", MAX_OPEN_CALLS),
                ("grpc.keepalive_time_ms", DEAD_AFTER_MS),
                ("grpc.keepalive_timeout_ms", DEAD_AFTER_MS),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                # Else a second server could listen on the same port, and get half of the calls.
                ("grpc.so_reuseport", 0),
            ],
        )
        self._port = self._listen()

    async def listens(self) -> None:
        """It does from the beginning on."""

    @property
    def url(self) -> str:
        host = self._config.host
        scheme = "grpc" if self._config.ssl_certfile is None else "grpcs"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self._port}"

    async def serve(self) -> None:
        await self._server.start()
        await self._stopping.wait()
        # Calls are answered meanwhile: the engine refuses new requests, and probes hear so. A
        # server that stops would leave those that arrive in this moment without an answer.
        await self._until_done()
        self._service.end()
        await self._server.stop(None if self._hurried.is_set() else LAST_WORDS_S)

    async def _until_done(self) -> None:
        """Until no request is open, or somebody is in a hurry, or time is up."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.drain_timeout + AFTER_DRAIN_S):
                while self._services.generator.open_ids("") and not self._hurried.is_set():
                    await asyncio.sleep(LOOK_S)

    def stop(self) -> None:
        """End without waiting for a signal."""
        self._stopping.set()

    def handle_exit(self, sig: int, frame: FrameType | None = None) -> None:
        """Called by the first signal, and by a second one of somebody in a hurry."""
        self._drain()
        is_second = self._stopping.is_set()
        self._loop.call_soon_threadsafe((self._hurried if is_second else self._stopping).set)

    def _listen(self) -> int:
        config = self._config
        host = f"[{config.host}]" if ":" in config.host else config.host
        address = f"{host}:{config.port}"
        try:
            if config.ssl_certfile is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, _credentials(config))
        except RuntimeError as error:
            raise ConfigError(
                f"gRPC cannot listen on {address}: {error}; choose another --port or --host, or "
                "see --ssl-certfile and --ssl-keyfile"
            ) from error


def _credentials(config: ServerConfig) -> grpc.ServerCredentials:
    """ConfigError if a file of the TLS options cannot be read."""
    assert config.ssl_certfile is not None
    try:
        chain = Path(config.ssl_certfile).read_bytes()
        key = chain if config.ssl_keyfile is None else Path(config.ssl_keyfile).read_bytes()
        authorities = (
            None if config.ssl_ca_certs is None else Path(config.ssl_ca_certs).read_bytes()
        )
    except OSError as error:
        raise ConfigError(
            f"the TLS files cannot be read: {error}; see --ssl-certfile, --ssl-keyfile and "
            "--ssl-ca-certs"
        ) from error
    return grpc.ssl_server_credentials(
        [(key, chain)],
        root_certificates=authorities,
        require_client_auth=authorities is not None,
    )
