"""`sapwood gateway`: one process that routes requests over engines. It imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import version
from types import FrameType

import uvicorn
import uvloop
from starlette.types import ASGIApp

from sapwood.app.gateway.discovery import found_workers
from sapwood.app.gateway.history import open_history
from sapwood.app.serving.http_server import HttpServer, access_of
from sapwood.base.errors import ConfigError
from sapwood.base.stopping import StopSignals
from sapwood.gateway.app import Gateway, Shared, metrics_app
from sapwood.gateway.chats import ChatMaker
from sapwood.http.callers import Caller, Callers, NamedKeys, Role, digest_of
from sapwood.observe.log import configure_logging
from sapwood.observe.tracing import Tracing, open_tracing
from sapwood.schema.config.gateway import GatewayConfig
from sapwood.schema.env import environment, home

log = logging.getLogger(__name__)

NO_METRICS = -1


def route(config: GatewayConfig) -> int:
    """Route until SIGTERM or Ctrl-C; the exit code."""
    configure_logging(config.log_level)
    stop = StopSignals()
    stop.install()
    return uvloop.run(_route(config, stop))


async def _route(config: GatewayConfig, stop: StopSignals) -> int:
    async with (
        open_history(config, home(environment())) as history,
        shared_state(config) as shared,
    ):
        tracing = tracing_of(config)
        access = access_of(config, callers_of(config))
        gateway = Gateway(config, access, history, shared, tracing, chat_maker(config))

        def drain() -> None:
            gateway.is_draining = True

        server = HttpServer(gateway, config, drain)
        stop.act_with(server.handle_exit)
        try:
            async with (
                found_workers(config, gateway.fleet, environment()),
                _metrics_server(config, gateway) as metrics_url,
            ):
                announced = asyncio.create_task(_announce(server, metrics_url, config, gateway))
                await server.serve()
                announced.cancel()
        finally:
            await gateway.close()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)
    log.info("ended")
    return 0


def tracing_of(config: GatewayConfig) -> Tracing | None:
    """Where spans go; None: nowhere. ConfigError if the endpoint cannot be used."""
    if not config.enable_trace:
        return None
    return open_tracing(
        config.otlp_traces_endpoint, service="sapwood-gateway", version=version("sapwood")
    )


@contextlib.asynccontextmanager
async def shared_state(config: GatewayConfig) -> AsyncIterator[Shared | None]:
    """What the gateway shares with others inside the block; None: nothing.

    Raises ConfigError if Redis cannot be used, or if its client library is not installed."""
    if not config.share_state:
        yield None
        return
    try:
        from sapwood.gateway.shared import open_shared
    except ImportError as error:
        raise ConfigError(
            "--share-state needs the package redis; install it with `pip install redis`"
        ) from error
    assert config.redis_url is not None
    async with open_shared(
        config.redis_url,
        max_connections=config.redis_pool_max,
        max_idle_s=config.max_idle_secs,
        max_per_second=config.rate_limit_per_key,
    ) as shared:
        yield shared


def chat_maker(config: GatewayConfig) -> ChatMaker | None:
    """None: the packages for it are not installed; ConfigError if the options ask for it."""
    try:
        from sapwood.app.gateway.chats import make_chats
    except ImportError as error:
        if not config.makes_chats:
            return None
        raise ConfigError(
            "--tool-call-parser and --reasoning-parser need the packages tokenizers and jinja2; "
            "install them with `pip install tokenizers jinja2`"
        ) from error
    return make_chats


def callers_of(config: GatewayConfig) -> tuple[Callers, ...]:
    """Those who know callers with names and roles, as the options say."""
    found: list[Callers] = []
    if config.named_keys:
        found.append(
            NamedKeys(
                {
                    digest_of(key): Caller(f"{name} ({id_})", Role(role))
                    for id_, name, role, key in config.named_keys
                }
            )
        )
    if config.jwt_issuer is not None:
        # The library is only needed for tokens.
        from sapwood.gateway.tokens import TokenCallers

        found.append(
            TokenCallers(
                issuer=config.jwt_issuer,
                audience=config.jwt_audience,
                key_set_url=config.jwt_jwks_uri,
                roles={name: Role(role) for name, role in config.token_roles.items()},
            )
        )
    return tuple(found)


async def _announce(
    server: HttpServer, metrics_url: str | None, config: GatewayConfig, gateway: Gateway
) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    log.info(
        "the gateway is at %s; policy %s, workers: %d",
        server.url,
        config.policy,
        len(gateway.fleet),
    )
    if metrics_url is not None:
        log.info("metrics are at %s", metrics_url)


@contextlib.asynccontextmanager
async def _metrics_server(config: GatewayConfig, gateway: Gateway) -> AsyncIterator[str | None]:
    """Serves /metrics inside the block. Yields its address; None if there is to be none."""
    if config.prometheus_port == NO_METRICS:
        yield None
        return
    server = _SilentServer(metrics_app(gateway.metrics), config)
    served = asyncio.create_task(server.serve())
    while not server.started and not served.done():
        await asyncio.sleep(0.01)
    if served.done():
        raise ConfigError(
            f"/metrics cannot be served on {config.prometheus_host}:{config.prometheus_port}, "
            "which is taken; choose another --prometheus-port, or -1 for none"
        )
    try:
        yield server.url
    finally:
        server.should_exit = True
        await served


class _SilentServer(uvicorn.Server):
    """A second server in a process whose signals the first one takes."""

    def __init__(self, app: ASGIApp, config: GatewayConfig) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=config.prometheus_host,
                port=config.prometheus_port,
                log_config=None,
                log_level="critical",
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=1,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def handle_exit(self, sig: int, frame: FrameType | None = None) -> None:
        """Ended by the block around it."""

    @property
    def url(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{host}:{port}/metrics"
