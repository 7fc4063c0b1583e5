"""The engine processes of several replicas: one supervisor each, and one client over all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from sapwood.app.serving.supervision import EngineSupervisor, RestartPolicy
from sapwood.base.process import Child
from sapwood.engine.balance import Balancer
from sapwood.engine.client import AsyncEngineClient
from sapwood.engine.replicas import ReplicatedClient

log = logging.getLogger(__name__)


class SpawnReplica(Protocol):
    def __call__(
        self, rank: int, known: AsyncEngineClient | None, inbox: str, outbox: str
    ) -> Child:
        """Start the engine of a replica.

        known  the client of an engine that was ready in this place; None: this is the first one
        """
        ...


class ReplicaGroup:
    """Keeps an engine process behind each of several replicas; `EngineSupervisor` of them all.

    A replica that fails ends its own requests. With a restart policy the others go on, and another
    engine takes its place; else, or if the policy gives up, the whole group ends. Replicas
    that compute steps jointly all end at once.
    """

    def __init__(
        self,
        spawn: SpawnReplica,
        sockets: Path,
        num_replicas: int,
        balancer: Balancer,
        *,
        start_timeout_s: float,
        policy: RestartPolicy | None,
        on_ready: Callable[[bool], None],
        on_failed: Callable[[str], None] | None = None,
        are_joint: bool = False,
        host: str | None = None,
    ) -> None:
        """Start all engines.

        on_ready   called with True when all engines have got ready
        on_failed  called with the reason why a replica has failed
        are_joint  whether no replica can go on without the others
        host       as that of an EngineSupervisor
        """
        self._are_joint = are_joint
        self._joint_failure: str | None = None
        self._on_all_ready = on_ready
        self._on_any_failed = on_failed
        self._known: dict[int, AsyncEngineClient] = {}
        self._supervisors: list[EngineSupervisor] = []
        for rank in range(num_replicas):
            folder = sockets / f"dp{rank}"
            folder.mkdir()
            self._supervisors.append(
                EngineSupervisor(
                    partial(self._spawn, spawn, rank),
                    folder,
                    start_timeout_s=start_timeout_s,
                    policy=policy,
                    on_ready=partial(self._on_ready, rank),
                    on_failed=partial(self._on_failed, rank),
                    host=host,
                )
            )
        self.engines = tuple(supervisor.client for supervisor in self._supervisors)
        self.client = ReplicatedClient(self.engines, balancer)

    @property
    def has_been_ready(self) -> bool:
        return self.client.has_started

    async def run(self) -> str:
        """Replace engines as often as the policy allows. Returns why one could not be replaced."""
        runs = [asyncio.ensure_future(supervisor.run()) for supervisor in self._supervisors]
        try:
            await asyncio.wait(runs, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in runs:
                one.cancel()
            await asyncio.gather(*runs, return_exceptions=True)
        for rank, one in enumerate(runs):
            if not one.cancelled():
                reason = self._joint_failure or f"replica {rank}: {one.result()}"
                self.client.end(reason)
                return reason
        raise asyncio.CancelledError

    def drain(self, timeout_s: float) -> None:
        for supervisor in self._supervisors:
            supervisor.drain(timeout_s)

    async def end(self) -> str | None:
        """End all engines in order. Returns the reason if one had failed for good; else None."""
        failures = await asyncio.gather(*(supervisor.end() for supervisor in self._supervisors))
        failed = [f"replica {rank}: {why}" for rank, why in enumerate(failures) if why is not None]
        return self._joint_failure or "; ".join(failed) or None

    async def close(self) -> None:
        await asyncio.gather(*(supervisor.close() for supervisor in self._supervisors))

    # ---- inside ------------------------------------------------------------------------------

    def _spawn(self, spawn: SpawnReplica, rank: int, inbox: str, outbox: str) -> Child:
        return spawn(rank, self._known.get(rank), inbox, outbox)

    def _on_ready(self, rank: int, is_first: bool) -> None:
        had_started = self.client.has_started
        self._known[rank] = self.engines[rank]
        self.client.join(rank)
        if not is_first:
            log.info("replica %d is ready again", rank)
        elif self.client.has_started and not had_started:
            self._on_all_ready(True)

    def _on_failed(self, rank: int, reason: str) -> None:
        self.client.leave(rank)
        if self._are_joint:
            if self._joint_failure is not None:
                return
            self._end_all(f"replica {rank}: {reason}")
        if self._on_any_failed is not None:
            self._on_any_failed(f"replica {rank}: {reason}")

    def _end_all(self, reason: str) -> None:
        """End every replica: those that are left wait for the failed one in the middle of a step,
        and could not be told anything."""
        self._joint_failure = reason
        for supervisor in self._supervisors:
            supervisor.client.fail(reason)
            supervisor.process.kill()
