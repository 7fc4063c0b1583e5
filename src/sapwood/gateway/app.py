"""The gateway's ASGI application, and all that one gateway consists of."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Protocol

from starlette.applications import Starlette
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sapwood.base.errors import ConfigError, Overloaded
from sapwood.gateway.audit import audit
from sapwood.gateway.caller_rates import CallerRates, Rates
from sapwood.gateway.chats import ChatMaker, Chats
from sapwood.gateway.conversations import conversations_dialect
from sapwood.gateway.dashboard import dashboard_dialect
from sapwood.gateway.exchange import Proxy, ProxyLimits, StickyKeys
from sapwood.gateway.fleet import Fleet
from sapwood.gateway.forwarded import forwarded_dialect
from sapwood.gateway.found import found_dialect, pictures_dialect
from sapwood.gateway.gate import Gate
from sapwood.gateway.kv_watch import KVWatch
from sapwood.gateway.metrics import GatewayMetrics
from sapwood.gateway.policies.known_pages import KnownPages
from sapwood.gateway.policies.registry import make_policies, policy_names
from sapwood.gateway.refused import refused_dialect
from sapwood.gateway.responses import Tools, responses_dialect
from sapwood.gateway.retries import RetryBudget, RetryLimits
from sapwood.gateway.steering import steering_dialect
from sapwood.gateway.worker import Worker, WorkerType, first_workers
from sapwood.history.interface import History
from sapwood.http.access import Access, Guarded
from sapwood.http.auth import CALLER
from sapwood.http.body import BodyLimits
from sapwood.http.callers import Caller
from sapwood.http.endpoints import Dialect, EndpointRoute, EndpointTable, FixedRoutes, Handler
from sapwood.http.errors import TooManyRequests, error_response
from sapwood.http.failures import answer_errors
from sapwood.observe.metrics import CONTENT_TYPE
from sapwood.observe.tracing import Tracing
from sapwood.schema.config.gateway import GatewayConfig

if TYPE_CHECKING:
    # Needs packages that a gateway without tokenizers has not.
    from sapwood.gateway.tokenizers.served import ServedTokenizers


class Middleware(Protocol):
    """What requests and answers of workers pass through."""

    @property
    def dialect(self) -> Dialect:
        """Its own endpoints."""
        ...

    def around(self, handler: Handler) -> Handler: ...
    def close(self) -> None: ...


class Shared(StickyKeys, Rates, Protocol):
    """What several gateways have in common."""


UNMATCHED = "unmatched"
"""The path label of calls that match no route, so that strangers cannot invent label values."""
LEFT = 499


class Gateway:
    """One gateway: an ASGI application over a fleet of workers. To be made in a running event loop.

    history      where responses and conversations are kept; None: the workers keep responses
    shared       what it has in common with other gateways
    tracing      where spans of requests go; None: nothing is traced
    make_chats   makes what answers chats at the gateway; None: what it needs is not installed
    is_draining  whether requests are refused because the gateway is about to end
    endpoints    all that it answers
    """

    def __init__(
        self,
        config: GatewayConfig,
        access: Access,
        history: History | None = None,
        shared: Shared | None = None,
        tracing: Tracing | None = None,
        make_chats: ChatMaker | None = None,
    ) -> None:
        rng = random.Random()
        self.is_draining = False
        self.metrics = GatewayMetrics(policy_names(config))
        self.gate = _gate(config)
        self._tokenizers = _tokenizers(config)
        self._kv_watch = _kv_watch() if config.follow_kv_events else None
        self.fleet = self._fleet(config, rng)
        self.metrics.workers = lambda: self.fleet
        self.metrics.gauges = self.gate
        proxy = Proxy(
            fleet=self.fleet,
            gate=self.gate,
            retries=_retries(config),
            budget=RetryBudget(config.retry_budget_ratio),
            limits=ProxyLimits(
                timeout_s=config.request_timeout_secs,
                stream_idle_s=config.stream_idle_timeout_secs,
                pass_key=not access.asks_for_keys,
                id_headers=config.id_headers,
            ),
            metrics=self.metrics,
            rng=rng,
            sticky=_sticky(config, shared),
            tracing=tracing,
        )
        self._tools: Tools | None = None
        if config.mcp_config_path is not None:
            self._tools = _tools(config, config.mcp_config_path, self.metrics)
        self._modules: Middleware | None = _modules(config) if config.enable_wasm else None
        self.endpoints = EndpointTable(self._dialects(config, proxy, history, make_chats))
        self._rates: Rates | None = None
        if config.rate_limit_per_key is not None:
            self._rates = shared or CallerRates(config.rate_limit_per_key)
        self._audits = not config.disable_audit_logging
        within = self._within_rate(self._routed(config))
        guarded: ASGIApp = Guarded(within, access=access, endpoints=self.endpoints)
        self._app = guarded

    def _fleet(self, config: GatewayConfig, rng: random.Random) -> Fleet:
        """The workers of the options; others are added later."""
        watch = self._kv_watch
        fleet = Fleet(
            config,
            make_policies(config, rng, None if watch is None else watch.follower.known),
            on_removed=self.metrics.forget,
            on_change=_nothing if watch is None else watch.changed,
            parts=None if self._tokenizers is None else self._tokenizers.brought,
        )
        self.metrics.kv_events = None if watch is None else watch.follower
        for spec in first_workers(config):
            fleet.add(spec)
        return fleet

    def _dialects(
        self,
        config: GatewayConfig,
        proxy: Proxy,
        history: History | None,
        make_chats: ChatMaker | None,
    ) -> list[Dialect]:
        """The tables of all that the gateway answers."""
        own: dict[str, Handler] = {}
        chats: Chats | None = None
        if self._tokenizers is not None:
            self.metrics.caches = self._tokenizers
            proxy.prompts = self._tokenizers.prompts(self.fleet)
            own.update(self._tokenizers.handlers(proxy))
            if make_chats is not None:
                chats = make_chats(config, self._tokenizers, proxy)
                own.update(chats.handlers)
        respond = None if chats is None else chats.respond
        brought = (self._modules, self._tokenizers, chats)
        return [
            *(one.dialect for one in brought if one is not None),
            forwarded_dialect(proxy, own),
            refused_dialect(has_parsers=chats is not None),
            found_dialect(proxy, respond)
            if history is None
            else responses_dialect(proxy, history, self._tools, respond),
            pictures_dialect(proxy),
            conversations_dialect(history),
            steering_dialect(self.fleet),
            dashboard_dialect(self.fleet, self.gate, self.metrics),
        ]

    def _routed(self, config: GatewayConfig) -> Starlette:
        """The application that finds the handler of a call."""
        fixed = FixedRoutes()
        routes: list[BaseRoute] = [fixed]
        for dialect in self.endpoints.dialects:
            for endpoint, handler in dialect.rows:
                handler = self._handler(dialect, handler)
                for path in endpoint.paths:
                    if "{" in path:
                        routes.append(EndpointRoute(path, handler, endpoint.answered_methods))
                    else:
                        fixed.add(path, endpoint.answered_methods, handler)
        app = Starlette(routes=routes)
        app.router.redirect_slashes = False
        app.state.body_limits = BodyLimits(
            max_bytes=config.max_request_bytes, timeout_s=config.request_body_timeout
        )
        answer_errors(app, self.endpoints)
        return app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = LEFT

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self.is_draining and scope["path"] != "/liveness":
                refusal = Overloaded("the gateway is about to end; ask another one")
                body = self.endpoints.error_form(scope["path"]).body
                await error_response(refusal, body)(scope, receive, sending)
            else:
                await self._app(scope, receive, sending)
        finally:
            self._count(scope, status)

    def _within_rate(self, app: ASGIApp) -> ASGIApp:
        """The application behind the limit on each caller's requests, if there is one."""
        rates = self._rates
        if rates is None:
            return app

        async def limited(scope: Scope, receive: Receive, send: Send) -> None:
            caller: Caller | None = scope.get(CALLER)
            try:
                if caller is not None:
                    await rates.take(caller)
            except TooManyRequests as refusal:
                body = self.endpoints.error_form(scope["path"]).body
                await error_response(refusal, body)(scope, receive, send)
                return
            await app(scope, receive, send)

        return limited

    async def close(self) -> None:
        await self.fleet.close()
        if self._kv_watch is not None:
            await self._kv_watch.close()
        if self._tools is not None:
            await self._tools.close()
        if self._modules is not None:
            self._modules.close()
        if self._tokenizers is not None:
            await self._tokenizers.close()

    def _handler(self, dialect: Dialect, handler: Handler) -> Handler:
        """The handler, behind the modules if it is one whose answers come from workers."""
        if self._modules is None or dialect.name not in _THROUGH_MODULES:
            return handler
        return self._modules.around(handler)

    def _count(self, scope: Scope, status: int) -> None:
        endpoint = self.endpoints.find(scope["method"], scope["path"])
        path = UNMATCHED if endpoint is None else endpoint.paths[0]
        method = (
            scope["method"] if endpoint is not None and scope["method"] in _METHODS else "other"
        )
        self.metrics.http_requests[method, path] += 1
        self.metrics.http_responses[method, path, str(status)] += 1
        if self._audits and endpoint is not None and endpoint.access == "admin":
            audit(scope, status)


def _gate(config: GatewayConfig) -> Gate:
    most_open = config.max_concurrent_requests
    return Gate(
        max_open=None if most_open < 0 else most_open,
        max_waiting=config.queue_size,
        max_wait_s=config.queue_timeout_secs,
        max_per_second=config.rate_limit_tokens_per_second,
    )


def _retries(config: GatewayConfig) -> RetryLimits:
    return RetryLimits(
        max_retries=0 if config.disable_retries else config.retry_max_retries,
        initial_backoff_s=config.retry_initial_backoff_ms / 1000,
        max_backoff_s=config.retry_max_backoff_ms / 1000,
        multiplier=config.retry_backoff_multiplier,
        jitter=config.retry_jitter_factor,
    )


def _sticky(config: GatewayConfig, shared: Shared | None) -> dict[WorkerType, StickyKeys]:
    if shared is None:
        return {}
    return {kind: shared for kind, name in policy_names(config).items() if name == "manual"}


def _nothing(worker: Worker) -> None:
    """For a gateway that follows no events."""


def _kv_watch() -> KVWatch:
    try:
        from sapwood.gateway.kv_follower import KVFollower
    except ImportError as error:
        raise ConfigError(
            "--follow-kv-events needs the package pyzmq; install it with `pip install pyzmq`"
        ) from error
    return KVWatch(KVFollower(KnownPages()))


def _modules(config: GatewayConfig) -> Middleware:
    try:
        from sapwood.gateway.wasm.middleware import WasmMiddleware
    except ImportError as error:
        raise ConfigError(
            "--enable-wasm needs the package wasmtime; install it with `pip install wasmtime`"
        ) from error
    return WasmMiddleware(
        timeout_s=config.wasm_timeout_secs, max_memory_bytes=config.wasm_max_memory_bytes
    )


def _tools(config: GatewayConfig, path: str, metrics: GatewayMetrics) -> Tools:
    try:
        from sapwood.gateway.mcp.config import load_servers
        from sapwood.gateway.mcp.responses import McpTools
    except ImportError as error:
        raise ConfigError(
            "--mcp-config-path needs the package mcp; install it with `pip install 'mcp>=2'`"
        ) from error
    return McpTools(
        load_servers(path),
        max_rounds=config.mcp_max_rounds,
        timeout_s=config.mcp_call_timeout_secs,
        max_result_bytes=config.mcp_max_result_bytes,
        on_call=metrics.called_tool,
    )


def _tokenizers(config: GatewayConfig) -> ServedTokenizers | None:
    """None: the packages for them are not installed, and nothing asks for them."""
    try:
        from sapwood.gateway.tokenizers.served import ServedTokenizers
    except ImportError as error:
        if config.tokenizer_source is None:
            return None
        raise ConfigError(
            "--tokenizer-path and --model-path need the packages tokenizers and jinja2; install "
            "them with `pip install tokenizers jinja2`"
        ) from error
    return ServedTokenizers(config)


_THROUGH_MODULES = frozenset({"forwarded", "found", "pictures", "responses"})
_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"})


def metrics_app(metrics: GatewayMetrics) -> ASGIApp:
    """An application that only has /metrics, for a port of its own."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        is_known = scope["path"] == "/metrics" and scope["method"] in ("GET", "HEAD")
        body = metrics.exposition() if is_known else b"there is only GET /metrics here\n"
        content_type = CONTENT_TYPE if is_known else "text/plain; charset=utf-8"
        headers = [
            (b"content-type", content_type.encode()),
            (b"content-length", str(len(body)).encode()),
        ]
        status = 200 if is_known else 404
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app
