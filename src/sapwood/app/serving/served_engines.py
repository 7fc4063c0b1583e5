"""Engine processes that live as long as somebody wants: for programs that bring their own loop."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from subprocess import Popen

import msgspec

from sapwood.app.building.engine_process import EngineProcessArgs
from sapwood.app.serving.engine_start import refuse_placement, start_engine_process
from sapwood.app.serving.replica_group import ReplicaGroup
from sapwood.app.serving.supervision import EngineSupervisor
from sapwood.base.errors import StartupError
from sapwood.base.process import hand_over
from sapwood.engine.balance import BALANCERS
from sapwood.engine.client import AsyncEngineClient
from sapwood.engine.replicas import ReplicatedClient
from sapwood.schema.config.engine import EngineConfig

START_TIMEOUT_S = 600.0


class ServedEngines:
    """The engine of a configuration, or its replicas, in processes. All methods are called from
    one event loop. An engine that fails is not replaced.

    config  as it was asked for; the model's files are verified
    home    directory of cached models
    """

    def __init__(self, config: EngineConfig, home: Path) -> None:
        """Start the processes."""
        refuse_placement(config)
        self._config = config
        self._home = home
        self._sockets = tempfile.TemporaryDirectory(prefix="sapwood-")
        self._ready = asyncio.Event()
        folder, parallel = Path(self._sockets.name), config.parallel
        self._supervisor: EngineSupervisor | ReplicaGroup
        self.client: AsyncEngineClient | ReplicatedClient
        self.replicas: tuple[AsyncEngineClient, ...] = ()
        if parallel.dp_size == 1:
            one = self._supervisor = EngineSupervisor(
                lambda inbox, outbox: self._spawn(0, None, inbox, outbox),
                folder,
                start_timeout_s=START_TIMEOUT_S,
                policy=None,
                on_ready=lambda _: self._ready.set(),
            )
            self.client = one.client
        else:
            group = self._supervisor = ReplicaGroup(
                self._spawn,
                folder,
                parallel.dp_size,
                BALANCERS[parallel.balance](),
                start_timeout_s=START_TIMEOUT_S,
                policy=None,
                on_ready=lambda _: self._ready.set(),
                are_joint=parallel.enable_dp_attention,
            )
            self.client, self.replicas = group.client, group.engines
        self._watching = asyncio.ensure_future(self._supervisor.run())

    async def until_ready(self) -> None:
        """Raises StartupError if an engine fails before all are ready."""
        ready = asyncio.ensure_future(self._ready.wait())
        await asyncio.wait({self._watching, ready}, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            ready.cancel()
            raise StartupError(self._watching.result())

    async def end(self) -> None:
        """Abort open requests and end the processes."""
        self._supervisor.drain(0.0)
        await self._supervisor.end()
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        await self._supervisor.close()
        self._sockets.cleanup()

    def _spawn(
        self, rank: int, known: AsyncEngineClient | None, inbox: str, outbox: str
    ) -> Popen[bytes]:
        args = EngineProcessArgs(
            config=self._config,
            home=str(self._home),
            inbox=inbox,
            outbox=outbox,
            log_level="warning",
            replica=rank,
            joint_folder=str(self._sockets.name)
            if self._config.parallel.enable_dp_attention
            else "",
        )
        process = start_engine_process()
        hand_over(process, msgspec.json.encode(args))
        return process
