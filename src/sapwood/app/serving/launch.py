"""`sapwood serve`: an engine process and, in this one, the server in front of it."""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from subprocess import Popen
from types import FrameType
from typing import TYPE_CHECKING, Protocol

import msgspec
import uvloop
from rich.console import Console

from sapwood.app.building.default_model import with_named_model
from sapwood.app.building.engine_process import EngineProcessArgs
from sapwood.app.building.model_defaults import eos_token_ids
from sapwood.app.building.model_files import check_deletable, delete_weights, open_model
from sapwood.app.serving.engine_start import start_engine_process
from sapwood.app.serving.http_server import HttpServer, access_of
from sapwood.app.serving.observability import print_stacks_on_signal, run_while_watched
from sapwood.app.serving.replica_group import ReplicaGroup
from sapwood.app.serving.services import build_services
from sapwood.app.serving.stores import batch_runner, open_stores
from sapwood.app.serving.supervision import EngineSupervisor, RestartPolicy
from sapwood.base.errors import ConfigError
from sapwood.base.process import Child, hand_over
from sapwood.base.stopping import StopSignals
from sapwood.engine.balance import BALANCERS
from sapwood.engine.client import AsyncEngineClient
from sapwood.frontends.batches.runner import BatchRunner
from sapwood.frontends.server import Stores, create_app
from sapwood.frontends.serving.limits import RequestLimits
from sapwood.frontends.serving.services import Services
from sapwood.http.body import BodyLimits
from sapwood.observe.log import configure_logging
from sapwood.schema.client import EngineClient
from sapwood.schema.config.disaggregation import Part
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.observability import ObservabilityConfig
from sapwood.schema.config.parallel import LOCAL
from sapwood.schema.config.server import ServerConfig
from sapwood.schema.env import environment, home
from sapwood.store import ModelFiles
from sapwood.store.terminal import TerminalProgress

if TYPE_CHECKING:
    from sapwood.app.on_ray.placement import RayPlacement

log = logging.getLogger(__name__)

Supervisor = EngineSupervisor | ReplicaGroup


class ApiServer(Protocol):
    """What clients of the engine talk to."""

    @property
    def url(self) -> str:
        """Where it listens, once `listens` has ended."""
        ...

    async def listens(self) -> None:
        """Wait until it takes connections."""
        ...

    async def serve(self) -> None:
        """Until a signal or `stop`, and then until open requests have ended."""
        ...

    def handle_exit(self, sig: int, frame: FrameType | None = None) -> None:
        """A signal has come; a second one means that somebody is in a hurry."""
        ...

    def stop(self) -> None: ...


FAREWELL_S = 2.0
"""Seconds from the engine's death to the server's end, in which health checks are answered 503."""


def serve(
    engine: EngineConfig,
    server: ServerConfig,
    observability: ObservabilityConfig | None = None,
    *,
    processes: Sequence[Popen[bytes]] = (),
) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit code. StartupError if the model cannot be had.

    processes  the first engines', if `start_engine_process` was called ahead
    """
    started_s = time.monotonic()
    configure_logging(server.log_level)
    print_stacks_on_signal()
    if engine.disaggregation.part is Part.PREFILL:
        at = engine.disaggregation.disaggregation_bootstrap_host or server.host
        place = replace(engine.disaggregation, disaggregation_bootstrap_host=at)
        engine = replace(engine, disaggregation=place)
    store = home(environment())
    progress = TerminalProgress(Console(stderr=True))
    engine = with_named_model(engine, home=store, progress=progress)
    if engine.model.delete_ckpt_after_loading:
        check_deletable(engine, restarts=server.restart_engine)
    files = open_model(engine.model, home=store, progress=progress)
    # Before there is anything to clean up: from here on a signal only asks for the end.
    stop = StopSignals()
    stop.install()
    with (
        tempfile.TemporaryDirectory(prefix="sapwood-") as sockets,
        _placed(engine, server, stop) as placement,
    ):
        session = _Session(
            engine,
            server,
            files,
            store,
            Path(sockets),
            started_s,
            stop,
            observability or ObservabilityConfig(),
            list(processes),
            placement,
        )
        return uvloop.run(session.run())


@contextmanager
def _placed(
    engine: EngineConfig, server: ServerConfig, stop: StopSignals
) -> Iterator[RayPlacement | None]:
    """Where the engines run, if it is not here; StartupError if there is no room for them."""
    if engine.parallel.placement == LOCAL:
        yield None
        return
    # Imported here: nothing of Ray is, unless it is asked for.
    from sapwood.app.on_ray.placement import RayPlacement

    placement = RayPlacement(
        engine,
        server.ray_address,
        timeout_s=server.start_timeout,
        is_stopped=lambda: stop.first is not None,
    )
    try:
        yield placement
    finally:
        placement.close()


def _grpc_server(
    services: Services, config: ServerConfig, drain: Callable[[], None], files: ModelFiles
) -> ApiServer:
    try:
        from sapwood.app.serving.grpc_server import GrpcServer
    except ImportError as error:
        raise ConfigError(
            "--grpc-mode needs the packages grpcio and protobuf; install them with `pip install "
            "'sapwood[grpc]'`"
        ) from error
    ends = eos_token_ids(files.path, vocab_size=services.generator.vocab_size)
    return GrpcServer(services, config, drain, eos_token_ids=tuple(sorted(ends)))


def body_limits_of(server: ServerConfig) -> BodyLimits:
    return BodyLimits(
        max_bytes=server.max_request_bytes,
        max_depth=server.max_json_depth,
        timeout_s=server.request_body_timeout,
    )


def request_limits_of(server: ServerConfig) -> RequestLimits:
    return RequestLimits(
        max_samples=server.max_samples_per_request,
        max_stop_strings=server.max_stop_strings,
        max_stop_length=server.max_stop_length,
        max_embed_bytes=server.max_request_bytes,
        max_logprobs=server.max_logprobs_per_call,
    )


@dataclass
class _Session:
    """One run of the server, from the first engine's start to the last one's end."""

    engine_config: EngineConfig
    server_config: ServerConfig
    files: ModelFiles
    store: Path
    sockets: Path
    started_s: float
    stop: StopSignals
    observability: ObservabilityConfig
    processes: list[Popen[bytes]]
    placement: RayPlacement | None
    api: ApiServer = field(init=False)
    client: EngineClient = field(init=False)
    services: Services = field(init=False)
    closes: ExitStack = field(default_factory=ExitStack)
    stores: Stores = field(default_factory=Stores)
    batches: BatchRunner | None = None
    run_batches: asyncio.Task[None] | None = None

    async def run(self) -> int:
        server = self.server_config
        policy = RestartPolicy(
            max_restarts=server.max_engine_restarts, window_s=server.engine_restart_window
        )
        supervisor = self._supervisor(policy if server.restart_engine else None)
        supervise: asyncio.Task[None] | None = None
        watched: asyncio.Task[None] | None = None
        try:
            self.api = self._api_server(supervisor)
            watched = asyncio.create_task(run_while_watched(self.observability, self.services))
            supervise = asyncio.create_task(self._supervise(supervisor))
            if self.batches is not None:
                self.run_batches = asyncio.create_task(self.batches.run())
            self.stop.act_with(self.api.handle_exit)
            await self.api.serve()
            self.stop.ignore()
            return self._exit_code(await supervisor.end())
        finally:
            if supervise is not None:
                supervise.cancel()
                await asyncio.gather(supervise, return_exceptions=True)
            self._stop_batches()
            if self.run_batches is not None:
                await asyncio.gather(self.run_batches, return_exceptions=True)
            if watched is not None:
                watched.cancel()
                await asyncio.gather(watched, return_exceptions=True)
            await supervisor.close()
            self.stores.close()
            self.closes.close()

    def _supervisor(self, policy: RestartPolicy | None) -> Supervisor:
        """Starts the engine, or those of all replicas."""
        parallel, timeout_s = self.engine_config.parallel, self.server_config.start_timeout
        host = None if self.placement is None else self.placement.host
        if parallel.dp_size == 1:
            return EngineSupervisor(
                lambda inbox, outbox: self._spawn(0, self.engine_config, inbox, outbox),
                self.sockets,
                start_timeout_s=timeout_s,
                policy=policy,
                on_ready=self._announce,
                on_failed=self._on_engine_failed,
                host=host,
            )
        return ReplicaGroup(
            self._spawn_replica,
            self.sockets,
            parallel.dp_size,
            BALANCERS[parallel.balance](),
            start_timeout_s=timeout_s,
            policy=policy,
            on_ready=self._announce,
            on_failed=self._on_engine_failed,
            are_joint=parallel.enable_dp_attention,
            host=host,
        )

    def _spawn_replica(
        self, rank: int, known: AsyncEngineClient | None, inbox: str, outbox: str
    ) -> Child:
        config = self.engine_config
        if known is not None:
            # What is free now is less than at the start, when the replicas shared it.
            memory = replace(config.memory, max_total_tokens=known.info.max_total_tokens)
            config = replace(config, memory=memory)
        return self._spawn(rank, config, inbox, outbox)

    def _spawn(self, rank: int, config: EngineConfig, inbox: str, outbox: str) -> Child:
        args = EngineProcessArgs(
            config=config,
            home=str(self.store),
            inbox=inbox,
            outbox=outbox,
            log_level=self.server_config.log_level,
            observability=self.observability,
            replica=rank,
            joint_folder=str(self.sockets) if config.parallel.enable_dp_attention else "",
        )
        if self.placement is not None:
            return self.placement.start(rank, args)
        process = self.processes.pop() if self.processes else start_engine_process()
        hand_over(process, msgspec.json.encode(args))
        return process

    def _api_server(self, supervisor: Supervisor) -> ApiServer:
        server = self.server_config
        self.client = supervisor.client
        services = self.services = replace(
            build_services(
                supervisor.client,
                self.files,
                self.engine_config,
                self.observability,
                replicas=supervisor.engines if isinstance(supervisor, ReplicaGroup) else (),
            ),
            limits=request_limits_of(server),
            on_unsupported="warn" if server.unsupported_fields == "warn" else "error",
        )
        self.closes.callback(services.close)
        loop = asyncio.get_running_loop()

        def drain() -> None:
            # The next server asks a batch's open lines again; a drain would end them with errors.
            loop.call_soon_threadsafe(self._stop_batches)
            loop.call_soon_threadsafe(supervisor.drain, server.drain_timeout)

        if server.grpc_mode:
            return _grpc_server(services, server, drain, self.files)
        self.stores = open_stores(server, self.store, services.model_name)
        app = create_app(
            services,
            access=access_of(server),
            body_limits=body_limits_of(server),
            stores=self.stores,
        )
        self.batches = batch_runner(server, self.engine_config.scheduler, services, self.stores)
        return HttpServer(app, server, drain)

    def _stop_batches(self) -> None:
        if self.run_batches is not None:
            self.run_batches.cancel()

    def _announce(self, is_first: bool) -> None:
        if not is_first:
            if self.services.adapters is not None:
                self.services.adapters.restarted()
            log.info("ready again")
            return
        for note in [*self.client.info.notes, *self.services.formats.decisions]:
            log.info("resolved: %s", note)
        for facts in self.client.info.ranks:
            log.info(
                "rank %d: process %d on %s, %s, %d threads, %.0f MB of weights in %.1f s",
                facts.rank,
                facts.pid,
                facts.host,
                facts.device,
                facts.num_threads,
                facts.weight_bytes / 1e6,
                facts.load_s,
            )
        if self.engine_config.model.delete_ckpt_after_loading:
            delete_weights(self.files)
        name = self.engine_config.model.served_model_name or self.engine_config.model.model
        seconds = time.monotonic() - self.started_s
        dp_size = self.engine_config.parallel.dp_size
        many = f" in {dp_size} replicas" if dp_size > 1 else ""
        log.info("ready after %.1f s: %s%s at %s", seconds, name, many, self.api.url)

    async def _supervise(self, supervisor: Supervisor) -> None:
        """End the server if the engine never gets ready, or dies and is not restarted."""
        # The engine of a small model might be ready before there is an address to tell.
        await self.api.listens()
        await supervisor.run()
        if supervisor.has_been_ready:
            await asyncio.sleep(FAREWELL_S)
        self.api.stop()

    def _on_engine_failed(self, reason: str) -> None:
        self.services.observer.write_crash_dump(reason)

    def _exit_code(self, failure: str | None) -> int:
        if failure is None:
            log.info("ended")
            return 0
        sys.stderr.write(f"sapwood: the engine failed: {failure}\n")
        return 1
