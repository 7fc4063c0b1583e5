"""Replicas for `sapwood.LLM`: engine processes, and their client's event loop in a thread here."""

from __future__ import annotations

import atexit
from pathlib import Path

from sapwood.app.offline.in_process import CLOSED
from sapwood.app.offline.loop_thread import LoopThread
from sapwood.app.serving.served_engines import ServedEngines
from sapwood.engine.client import AsyncEngineClient
from sapwood.engine.replicas import ReplicatedClient
from sapwood.schema.config.engine import EngineConfig


class ReplicaEngines:
    """Starts the engines and serves `client` from them until they are closed, or one fails.

    Raises  StartupError if an engine does not get ready
    """

    client: AsyncEngineClient | ReplicatedClient
    replicas: tuple[AsyncEngineClient, ...]

    def __init__(self, config: EngineConfig, home: Path) -> None:
        self.loop = LoopThread("sapwood-loop", closed_reason=CLOSED)
        self._served: ServedEngines | None = None
        atexit.register(self.close)
        try:
            self.loop.run(self._start(config, home))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Abort open requests and end all processes. May be called twice."""
        if self.loop.is_current:
            raise RuntimeError(
                "an LLM cannot be closed from its own event loop, such as from an on_finish "
                "function; close it from another thread"
            )
        if self._served is not None:
            self.loop.run(self._served.end())
            self._served = None
        self.loop.close()
        atexit.unregister(self.close)

    async def _start(self, config: EngineConfig, home: Path) -> None:
        served = self._served = ServedEngines(config, home)
        self.client, self.replicas = served.client, served.replicas
        await served.until_ready()
