"""`sapwood serve`: an engine process and, in this one, the HTTP server in front of it."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from types import FrameType

import msgspec
import uvicorn
import uvloop
from rich.console import Console

from sapwood.app.engine_process import EngineProcessArgs
from sapwood.app.services import build_services
from sapwood.base.channel import AsyncZmqReceiver, ZmqSender
from sapwood.base.process import spawn_module, watch
from sapwood.engine.client import AsyncEngineClient
from sapwood.frontends.server import create_app
from sapwood.models.store import ModelFiles, fetch_model
from sapwood.models.store.terminal import TerminalProgress
from sapwood.observe.log import configure_logging
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.server import ServerConfig
from sapwood.schema.env import environment, home
from sapwood.schema.output import EngineOutput
from sapwood.schema.request import EngineInput

log = logging.getLogger(__name__)

AFTER_DRAIN_S = 5
"""What is still open so long after the drain limit has its connection cut."""
FAREWELL_S = 2.0
"""After the engine has died, health checks are answered 503 for so long before the server ends."""
ENGINE_EXIT_S = 10.0
"""A drained engine that has not ended after this long is killed."""


def serve(engine: EngineConfig, server: ServerConfig) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit code. StartupError if the model cannot be had."""
    started_s = time.monotonic()
    configure_logging(server.log_level)
    store = home(environment())
    files = fetch_model(
        engine.model.model,
        home=store,
        revision=engine.model.revision,
        load_format=engine.model.load_format,
        offline=engine.model.offline,
        progress=TerminalProgress(Console(stderr=True)),
    )
    with tempfile.TemporaryDirectory(prefix="sapwood-") as sockets:
        session = _Session(engine, server, files, store, Path(sockets), started_s)
        return uvloop.run(session.run())


@dataclass
class _Session:
    """One run of the server, from the engine's start to its end."""

    engine_config: EngineConfig
    server_config: ServerConfig
    files: ModelFiles
    store: Path
    sockets: Path
    started_s: float
    exited: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> int:
        inbox, outbox = (f"ipc://{self.sockets}/{name}" for name in ("requests", "outputs"))
        sender: ZmqSender[EngineInput] = ZmqSender(inbox, bind=True)
        receiver: AsyncZmqReceiver[EngineOutput] = AsyncZmqReceiver(outbox, EngineOutput, bind=True)
        client = AsyncEngineClient(sender)
        process = self._spawn(inbox, outbox)
        self._watch(process, client)
        pump = asyncio.create_task(_pump(receiver, client))
        http = self._http_server(client)
        announce = asyncio.create_task(self._announce(client, http))
        try:
            await http.serve()
            return await self._end(process, client)
        finally:
            for task in (pump, announce):
                task.cancel()
            await asyncio.gather(pump, announce, return_exceptions=True)
            _kill(process)
            sender.close()
            receiver.close()

    def _spawn(self, inbox: str, outbox: str) -> Popen[bytes]:
        args = EngineProcessArgs(
            config=self.engine_config,
            home=str(self.store),
            inbox=inbox,
            outbox=outbox,
            log_level=self.server_config.log_level,
        )
        return spawn_module("sapwood.app.engine_process", msgspec.json.encode(args))

    def _watch(self, process: Popen[bytes], client: AsyncEngineClient) -> None:
        loop = asyncio.get_running_loop()

        def on_exit(what: str, code: int) -> None:
            loop.call_soon_threadsafe(self.exited.set)
            if code == 0 and client.is_draining:
                return
            # A message that says why may still be in the socket: it comes first.
            delay_s = 0.0 if code < 0 else 0.5
            loop.call_soon_threadsafe(
                loop.call_later, delay_s, client.fail, f"the engine process {what}"
            )

        watch(process, on_exit)

    def _http_server(self, client: AsyncEngineClient) -> uvicorn.Server:
        services = build_services(client, self.files, self.engine_config)
        config = uvicorn.Config(
            create_app(services),
            host=self.server_config.host,
            port=self.server_config.port,
            log_config=None,
            access_log=self.server_config.log_level == "debug",
            log_level="warning",
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=int(self.server_config.drain_timeout) + AFTER_DRAIN_S,
        )
        # The server hands a signal on once it has drained: it must find a handler without effect.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        loop = asyncio.get_running_loop()

        def drain() -> None:
            loop.call_soon_threadsafe(client.drain, self.server_config.drain_timeout)

        return _DrainingServer(config, drain)

    async def _announce(self, client: AsyncEngineClient, http: uvicorn.Server) -> None:
        """Say when the engine is ready; end the server when it never gets ready, or dies."""
        try:
            async with asyncio.timeout(self.server_config.start_timeout):
                await client.wait_for_change()
        except TimeoutError:
            client.fail(f"the engine was not ready after {self.server_config.start_timeout:g} s")
        if client.failure is None:
            for note in client.info.notes:
                log.info("resolved: %s", note)
            name = self.engine_config.model.served_model_name or self.engine_config.model.model
            log.info(
                "ready after %.1f s: %s at %s", time.monotonic() - self.started_s, name, _url(http)
            )
            await client.wait_until_failed()
            await asyncio.sleep(FAREWELL_S)
        http.should_exit = True

    async def _end(self, process: Popen[bytes], client: AsyncEngineClient) -> int:
        """The HTTP server has ended: drained, or because the engine is gone."""
        failure = client.failure
        if failure is None:
            client.drain(0.0)
            try:
                async with asyncio.timeout(ENGINE_EXIT_S):
                    await self.exited.wait()
            except TimeoutError:
                log.warning("the engine did not end within %.0f s; killing it", ENGINE_EXIT_S)
            log.info("ended")
            return 0
        sys.stderr.write(f"sapwood: the engine failed: {failure}\n")
        return 1


class _DrainingServer(uvicorn.Server):
    """On a signal the engine drains too: what is open at its limit gets its own finish."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._drain()
        super().handle_exit(sig, frame)


async def _pump(receiver: AsyncZmqReceiver[EngineOutput], client: AsyncEngineClient) -> None:
    async for message in receiver.messages():
        client.deliver(message)


def _url(http: uvicorn.Server) -> str:
    for server in http.servers:
        for socket in server.sockets:
            host, port = socket.getsockname()[:2]
            return f"http://{host}:{port}"
    return f"http://{http.config.host}:{http.config.port}"


def _kill(process: Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.kill()
    try:
        process.wait(ENGINE_EXIT_S)
    except TimeoutExpired:
        log.error("the engine process %d cannot be killed", process.pid)
