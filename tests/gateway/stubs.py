"""Small engines that answer as they are told, and a gateway in front of them."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

from sapwood.app.gateway.assembly import callers_of, chat_maker
from sapwood.app.serving.http_server import HttpServer, access_of
from sapwood.gateway.app import Gateway, Shared
from sapwood.gateway.worker import Worker, WorkerState
from sapwood.history.interface import History
from sapwood.observe.tracing import Tracing
from sapwood.schema.config.gateway import GatewayConfig
from sapwood.schema.config.listening import ListeningConfig

LIMIT_S = 60.0
"""Nothing here takes nearly so long, unless it hangs."""


@dataclass
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    target: str


class Stub:
    """An engine of which a test says how it behaves.

    behaviour  "ok"; a status; "hang": never answers; "cut": breaks off within a stream;
               "cut_event": likewise, within an event; "large": a long body
    """

    def __init__(self, name: str, *, models: Sequence[str] = ("m",)) -> None:
        self.name = name
        self.models = list(models)
        self.context: int | None = None
        self.behaviour: str | int = "ok"
        self.health: str | int = 200
        self.num_events = 3
        self.event_s = 0.0
        self.asked: list[Asked] = []
        self.num_left = 0
        self.url = ""
        self.go_on = asyncio.Event()

    @property
    def posts(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.method == "POST"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        path = scope["path"]
        if path == "/health":
            if self.health == "hang":
                await self._until_left(receive)
                return
            assert isinstance(self.health, int)
            await _json(send, {}, self.health)
            return
        if path == "/v1/models":
            told = {} if self.context is None else {"max_model_len": self.context}
            data = [
                {"id": model, "object": "model", "owned_by": "stub", **told}
                for model in self.models
            ]
            await _json(send, {"object": "list", "data": data})
            return
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        target = scope["raw_path"].decode() + "?" + scope["query_string"].decode()
        self.asked.append(Asked(scope["method"], path, headers, body, target))
        if isinstance(self.behaviour, int):
            await _json(send, {"error": {"message": "told to fail"}}, self.behaviour)
        elif self.behaviour == "hang":
            await self._until_left(receive)
        elif self.behaviour == "large":
            await _start(send, "application/octet-stream")
            for _ in range(64):
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        elif _wants_stream(body):
            await self._stream(receive, send, self.events(self.asked[-1]))
        else:
            await _json(send, self.answer(self.asked[-1]))

    def answer(self, asked: Asked) -> object:
        """The JSON of a good answer."""
        return {"worker": self.name, "choices": []}

    def events(self, asked: Asked) -> list[bytes]:
        """The events of a good stream."""
        name = self.name.encode()
        return [b'data: {"worker": "%s", "n": %d}\n\n' % (name, n) for n in range(self.num_events)]

    async def _stream(self, receive: Receive, send: Send, events: Sequence[bytes]) -> None:
        await _start(send, "text/event-stream")
        left = asyncio.ensure_future(self._until_left(receive))
        try:
            for index, event in enumerate(events):
                if self.behaviour == "cut_event" and index == 1:
                    event = event[:10]
                await send({"type": "http.response.body", "body": event, "more_body": True})
                if self.behaviour in ("cut", "cut_event") and index == 1:
                    return  # the server closes the connection
                if self.behaviour == "wait" and index == 0:
                    done, _ = await asyncio.wait(
                        {left, asyncio.ensure_future(self.go_on.wait())},
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                    if left in done:
                        return
                await asyncio.sleep(self.event_s)
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        finally:
            left.cancel()

    async def _until_left(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        self.num_left += 1


def _wants_stream(body: bytes) -> bool:
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(asked, dict) and bool(asked.get("stream"))


async def _start(send: Send, content_type: str) -> None:
    headers = [
        (b"content-type", content_type.encode()),
        (b"keep-alive", b"timeout=5"),
        (b"x-stub", b"yes"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _json(send: Send, content: object, status: int = 200) -> None:
    body = json.dumps(content).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-stub", b"yes"),
        (b"access-control-allow-origin", b"*"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Running:
    """An application behind a socket; `kill` ends it at once, as the end of its process would."""

    def __init__(
        self, app: ASGIApp, port: int = 0, *, config: ListeningConfig | None = None
    ) -> None:
        self._server = HttpServer(app, config or ListeningConfig(port=port), lambda: None)

    async def __aenter__(self) -> Running:
        self._task = asyncio.create_task(self._server.serve())
        while not self._server.started:
            assert not self._task.done()
            await asyncio.sleep(0.005)
        self.url = self._server.url
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def kill(self) -> socket.socket:
        """Returns a socket that keeps the port, without listening: else a server of another test
        might get it and answer."""
        await self._end()
        kept = socket.socket()
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", self.port))
        return kept

    async def _end(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._abort_connections()
        await self._task
        # Those that were accepted meanwhile would go on answering health checks.
        await asyncio.sleep(0)
        self._abort_connections()

    def _abort_connections(self) -> None:
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()  # type: ignore[union-attr]


@dataclass
class Bench:
    """A gateway over stubs, and a client of it."""

    gateway: Gateway
    url: str
    client: httpx.AsyncClient
    stubs: list[Stub]
    engines: list[Running] = field(default_factory=list)

    async def post(self, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
        headers = fields.pop("headers", {})
        return await self.client.post(path, json={"model": "m", **fields}, headers=headers)

    def worker(self, stub: Stub) -> Worker:
        return next(one for one in self.gateway.fleet if one.url == stub.url)

    async def until(self, state: WorkerState, *stubs: Stub) -> None:
        for stub in stubs or self.stubs:
            while self.worker(stub).state is not state:
                await asyncio.sleep(0.005)

    def num_open(self) -> int:
        """Requests and connections that somebody still holds."""
        return self.gateway.gate.num_open + sum(
            worker.num_open + worker.pool.num_open - worker.pool.num_idle
            for worker in self.gateway.fleet
        )


@asynccontextmanager
async def bench(
    *stubs: Stub,
    wait: bool = True,
    limit_s: float = LIMIT_S,
    history: History | None = None,
    shared: Shared | None = None,
    tracing: Tracing | None = None,
    **options: Any,
) -> AsyncIterator[Bench]:
    """A gateway over these engines, which are healthy if `wait` is set."""
    options = {"policy": "round_robin", "worker_startup_check_interval": 0.02} | options
    options = {"retry_initial_backoff_ms": 1.0, "health_check_timeout_secs": 5.0} | options
    async with asyncio.timeout(limit_s), AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(Running(stub)) for stub in stubs]
        for stub, engine in zip(stubs, engines, strict=True):
            stub.url = engine.url
        urls = ",".join(engine.url for engine in engines)
        config = GatewayConfig(port=0, **{"worker_urls": urls, **options})
        access = access_of(config, callers_of(config))
        gateway = Gateway(config, access, history, shared, tracing, chat_maker(config))
        stack.push_async_callback(gateway.close)
        served = await stack.enter_async_context(Running(gateway))
        client = await stack.enter_async_context(
            httpx.AsyncClient(base_url=served.url, timeout=LIMIT_S, trust_env=False)
        )
        made = Bench(gateway, served.url, client, list(stubs), engines)
        if wait:
            await made.until(WorkerState.READY)
        yield made
