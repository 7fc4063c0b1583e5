"""Replicas for `sapwood.LLM`: engine processes, and their client's event loop in a thread here."""

from __future__ import annotations

import asyncio
import atexit
import tempfile
from collections.abc import Sequence
from pathlib import Path
from subprocess import Popen

import msgspec

from sapwood.app.engine_process import EngineProcessArgs
from sapwood.app.engine_start import start_engine_process
from sapwood.app.in_process import CLOSED
from sapwood.app.loop_thread import LoopThread
from sapwood.app.replica_group import ReplicaGroup
from sapwood.base.errors import StartupError
from sapwood.base.process import hand_over
from sapwood.engine.balance import BALANCERS
from sapwood.engine.client import AsyncEngineClient
from sapwood.engine.replicas import ReplicatedClient
from sapwood.schema.client import EngineClient
from sapwood.schema.config.engine import EngineConfig

START_TIMEOUT_S = 600.0


class ReplicaEngines:
    """Starts the engines and serves `client` from them until they are closed, or one fails.

    config  as it was asked for, with more than one replica; the model's files are verified
    home    directory of cached models
    Raises  StartupError if an engine does not get ready
    """

    def __init__(self, config: EngineConfig, home: Path) -> None:
        self._config = config
        self._home = home
        self._sockets = tempfile.TemporaryDirectory(prefix="sapwood-")
        self.loop = LoopThread("sapwood-loop", closed_reason=CLOSED)
        self._group: ReplicaGroup | None = None
        atexit.register(self.close)
        try:
            self.loop.run(self._start())
        except BaseException:
            self.close()
            raise
        group = self._group
        assert group is not None
        self.client: ReplicatedClient = group.client
        self.engines: Sequence[EngineClient] = group.engines

    def close(self) -> None:
        """Abort open requests and end all processes. May be called twice."""
        if self.loop.is_current:
            raise RuntimeError(
                "an LLM cannot be closed from its own event loop, such as from an on_finish "
                "function; close it from another thread"
            )
        if self._group is not None:
            self.loop.run(self._end(self._group))
            self._group = None
        self.loop.close()
        self._sockets.cleanup()
        atexit.unregister(self.close)

    async def _start(self) -> None:
        ready = asyncio.Event()
        parallel = self._config.parallel
        self._group = ReplicaGroup(
            self._spawn,
            Path(self._sockets.name),
            parallel.dp_size,
            BALANCERS[parallel.balance](),
            start_timeout_s=START_TIMEOUT_S,
            policy=None,
            on_ready=lambda _: ready.set(),
        )
        self._watching = asyncio.ensure_future(self._group.run())
        is_ready = asyncio.ensure_future(ready.wait())
        await asyncio.wait({self._watching, is_ready}, return_when=asyncio.FIRST_COMPLETED)
        if not is_ready.done():
            is_ready.cancel()
            raise StartupError(self._watching.result())

    async def _end(self, group: ReplicaGroup) -> None:
        group.drain(0.0)
        await group.end()
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        group.client.end(CLOSED)
        await group.close()

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
        )
        process = start_engine_process()
        hand_over(process, msgspec.json.encode(args))
        return process
