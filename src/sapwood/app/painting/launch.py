"""`sapwood serve` of a diffusion model: an engine process and, in this one, the server."""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import msgspec
import uvloop

from sapwood.app.painting.engine_process import MODULE, PainterProcessArgs
from sapwood.app.serving.http_server import HttpServer, access_of
from sapwood.app.serving.launch import FAREWELL_S, body_limits_of
from sapwood.app.serving.observability import build_tracing, print_stacks_on_signal
from sapwood.app.serving.supervision import ProcessSupervisor, RestartPolicy
from sapwood.base.clock import MonotonicClock
from sapwood.base.process import Child, hand_over, start_module
from sapwood.base.stopping import StopSignals
from sapwood.diffusion.client import AsyncPaintingClient
from sapwood.frontends.images.server import create_painting_app
from sapwood.frontends.images.services import PaintingServices
from sapwood.frontends.images.stored import PictureStore
from sapwood.frontends.videos.records import VideoStore
from sapwood.observe.log import configure_logging
from sapwood.observe.tracing import Tracing
from sapwood.schema.config.observability import ObservabilityConfig
from sapwood.schema.config.painting import PaintingConfig
from sapwood.schema.config.server import ServerConfig
from sapwood.schema.painting import PainterOutput

log = logging.getLogger(__name__)


def serve_painting(
    model: str,
    model_name: str,
    painting: PaintingConfig,
    server: ServerConfig,
    observability: ObservabilityConfig,
) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit code.

    model       folder with model_index.json
    model_name  that the API shows and accepts
    """
    started_s = time.monotonic()
    configure_logging(server.log_level)
    print_stacks_on_signal()
    stop = StopSignals()
    stop.install()
    with tempfile.TemporaryDirectory(prefix="sapwood-") as folder:
        session = _Session(
            model, model_name, painting, server, observability, Path(folder), started_s, stop
        )
        return uvloop.run(session.run())


@dataclass
class _Session:
    """One run of the server, from the engine's start to its end."""

    model: str
    model_name: str
    painting: PaintingConfig
    server: ServerConfig
    observability: ObservabilityConfig
    folder: Path
    started_s: float
    stop: StopSignals
    api: HttpServer = field(init=False)
    client: AsyncPaintingClient = field(init=False)
    store: PictureStore | None = None
    videos: VideoStore | None = None
    tracing: Tracing | None = None

    async def run(self) -> int:
        server = self.server
        policy = RestartPolicy(
            max_restarts=server.max_engine_restarts, window_s=server.engine_restart_window
        )
        supervisor: ProcessSupervisor[AsyncPaintingClient] = ProcessSupervisor(
            self._spawn,
            self.folder,
            AsyncPaintingClient,
            PainterOutput,
            start_timeout_s=server.start_timeout,
            policy=policy if server.restart_engine else None,
            on_ready=self._announce,
        )
        self.client = supervisor.client
        self.tracing = build_tracing(self.observability, "sapwood-api")
        supervise: asyncio.Task[None] | None = None
        try:
            self.api = self._api(supervisor)
            supervise = asyncio.create_task(self._supervise(supervisor))
            self.stop.act_with(self.api.handle_exit)
            await self.api.serve()
            self.stop.ignore()
            return _exit_code(await supervisor.end())
        finally:
            if supervise is not None:
                supervise.cancel()
                await asyncio.gather(supervise, return_exceptions=True)
            await supervisor.close()
            if self.tracing is not None:
                # In a thread: the last spans may take seconds to send.
                await asyncio.to_thread(self.tracing.close)
            # Ids end with this server, so nobody could fetch its pictures any more.
            if self.store is not None and not self.painting.output_path:
                self.store.clear()
            if self.videos is not None and not (self.painting.output_path or self.server.state_dir):
                self.videos.clear()

    def _spawn(self, inbox: str, outbox: str) -> Child:
        process = start_module(MODULE)
        args = PainterProcessArgs(
            model=self.model,
            config=self.painting,
            inbox=inbox,
            outbox=outbox,
            log_level=self.server.log_level,
            observability=self.observability,
        )
        hand_over(process, msgspec.json.encode(args))
        return process

    def _api(self, supervisor: ProcessSupervisor[AsyncPaintingClient]) -> HttpServer:
        painting = self.painting
        pictures = self.folder / "pictures"
        if painting.output_path:
            pictures = Path(painting.output_path)
        elif self.server.state_dir:
            pictures = Path(self.server.state_dir) / "pictures"
        self.store = PictureStore(
            _made(pictures),
            max_bytes=painting.max_stored_picture_bytes,
            max_age_s=painting.stored_picture_age,
            clock=MonotonicClock(),
        )
        self.videos = VideoStore(
            _made(pictures.with_name("videos") if not painting.output_path else pictures),
            max_bytes=painting.max_stored_video_bytes,
            max_age_s=painting.stored_video_age,
            max_kept=painting.max_kept_videos,
            now=time.time,
        )
        services = PaintingServices(
            engine=supervisor.client,
            config=painting,
            store=self.store,
            model_name=self.model_name,
            model_path=self.model,
            created=int(time.time()),
            version=version("sapwood"),
            serves_metrics=self.observability.enable_metrics,
            shows_paths=painting.output_path is not None,
            tracing=self.tracing,
        )
        app = create_painting_app(
            services,
            self.videos,
            access=access_of(self.server),
            body_limits=body_limits_of(self.server),
        )
        loop = asyncio.get_running_loop()

        def drain() -> None:
            loop.call_soon_threadsafe(supervisor.drain, self.server.drain_timeout)

        return HttpServer(app, self.server, drain)

    def _announce(self, is_first: bool) -> None:
        if not is_first:
            log.info("ready again")
            return
        for note in self.client.info.notes:
            log.info("resolved: %s", note)
        seconds = time.monotonic() - self.started_s
        log.info("ready after %.1f s: %s at %s", seconds, self.model_name, self.api.url)

    async def _supervise(self, supervisor: ProcessSupervisor[AsyncPaintingClient]) -> None:
        """End the server if the engine never gets ready, or dies and is not restarted."""
        # The engine of a small model might be ready before there is an address to tell.
        await self.api.listens()
        await supervisor.run()
        if supervisor.has_been_ready:
            await asyncio.sleep(FAREWELL_S)
        self.api.stop()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _exit_code(failure: str | None) -> int:
    if failure is None:
        log.info("ended")
        return 0
    sys.stderr.write(f"sapwood: the engine failed: {failure}\n")
    return 1
