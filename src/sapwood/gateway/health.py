"""Watches one worker: whether it is healthy, and which models it serves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import orjson

from sapwood.base.errors import SapwoodError
from sapwood.gateway.client import NotConnected, WorkerFailure
from sapwood.gateway.own_requests import get
from sapwood.gateway.worker import EXTERNAL_HEALTH_PATH, Worker, WorkerSpec, WorkerState
from sapwood.schema.config.gateway import GatewayConfig

log = logging.getLogger(__name__)

MAX_MODELS = 1000
LINK_HEALTH_PATH = "/health"


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthLimits:
    """A worker's health checks; the spec's values count more than the gateway's."""

    path: str
    interval_s: float
    timeout_s: float
    failures: int
    successes: int
    startup_interval_s: float
    startup_timeout_s: float
    is_off: bool

    @classmethod
    def of(cls, config: GatewayConfig, spec: WorkerSpec, *, by_link: bool) -> HealthLimits:
        is_external = spec.runtime == "external"
        is_off = spec.disable_health_check
        path = EXTERNAL_HEALTH_PATH if is_external else config.health_check_endpoint
        if by_link:
            path = LINK_HEALTH_PATH
        return cls(
            path=path,
            interval_s=spec.health_check_interval_secs or config.health_check_interval_secs,
            timeout_s=spec.health_check_timeout_secs or config.health_check_timeout_secs,
            failures=spec.health_failure_threshold or config.health_failure_threshold,
            successes=spec.health_success_threshold or config.health_success_threshold,
            startup_interval_s=config.worker_startup_check_interval,
            startup_timeout_s=config.worker_startup_timeout_secs,
            is_off=config.disable_health_check if is_off is None else is_off,
        )


class HealthWatch:
    """Checks one worker until it is cancelled.

    on_change  called when the worker's state has changed, or the models that it serves
    prepare    awaited before the worker gets requests; raises SapwoodError if it cannot get any
    """

    def __init__(
        self,
        worker: Worker,
        config: GatewayConfig,
        on_change: Callable[[Worker], None],
        prepare: Callable[[Worker], Awaitable[None]],
    ) -> None:
        self._worker = worker
        self._config = config
        self._on_change = on_change
        self._prepare = prepare
        self._is_unreachable = False

    @property
    def _limits(self) -> HealthLimits:
        """Read anew each time: the worker's spec may be changed at run time."""
        return HealthLimits.of(
            self._config, self._worker.spec, by_link=self._worker.link is not None
        )

    async def run(self) -> None:
        if self._limits.is_off:
            await self._become_ready()
            return
        if not await self._start():
            return
        num_failures = num_successes = 0
        while True:
            await self._until_due()
            limits = self._limits
            if await self._is_healthy():
                self._worker.breaker.reached()
                num_failures, num_successes = 0, num_successes + 1
            else:
                num_failures, num_successes = num_failures + 1, 0
            state = self._worker.state
            if state is WorkerState.READY and num_failures >= limits.failures:
                self._move_to(WorkerState.UNHEALTHY)
                self._worker.give_up_unanswered(f"the worker is down: {self._worker.last_error}")
            elif state is WorkerState.UNHEALTHY and num_successes >= limits.successes:
                await self._become_ready()

    async def _until_due(self) -> None:
        """Sleep until the next check. A worker that is unhealthy, or that requests cannot reach, is
        checked more often, so that it gets requests soon after it was started anew."""
        loop = asyncio.get_running_loop()
        begin_s = loop.time()
        while True:
            limits = self._limits
            await asyncio.sleep(min(limits.interval_s, limits.startup_interval_s))
            is_down = self._worker.state is WorkerState.UNHEALTHY
            is_lost = self._is_unreachable or self._worker.breaker.is_unreachable
            if is_down or is_lost or loop.time() >= begin_s + limits.interval_s:
                return

    async def _start(self) -> bool:
        """Wait for the first good check; whether it has come in time, and the worker is ready."""
        deadline_s = asyncio.get_running_loop().time() + self._limits.startup_timeout_s
        while not await self._is_healthy():
            if asyncio.get_running_loop().time() >= deadline_s:
                self._move_to(WorkerState.FAILED)
                return False
            await asyncio.sleep(self._limits.startup_interval_s)
        return await self._become_ready()

    async def _become_ready(self) -> bool:
        """A worker that cannot be prepared has failed, or stays unhealthy."""
        worker = self._worker
        await self._learn_models()
        try:
            await self._prepare(worker)
        except SapwoodError as error:
            worker.last_error = error.message
            if worker.state is WorkerState.STARTING:
                self._move_to(WorkerState.FAILED)
            return False
        self._move_to(WorkerState.READY)
        return True

    async def _is_healthy(self) -> bool:
        try:
            status, _ = await get(self._worker, self._limits.path, self._limits.timeout_s)
        except WorkerFailure as error:
            self._worker.last_error = str(error)
            self._is_unreachable = isinstance(error, NotConnected)
            return False
        self._is_unreachable = False
        if status != 200:
            self._worker.last_error = f"GET {self._limits.path} was answered with {status}"
            return False
        self._worker.last_error = None
        return True

    async def _learn_models(self) -> None:
        try:
            status, body = await get(self._worker, "/v1/models", self._limits.timeout_s)
        except WorkerFailure as error:
            log.warning(
                "worker %s does not say which models it serves: %s", self._worker.url, error
            )
            return
        self._worker.learn(_cards(body) if status == 200 else [])

    def _move_to(self, state: WorkerState) -> None:
        worker = self._worker
        if worker.state is state:
            return
        worker.move_to(state)
        if state is WorkerState.READY:
            models = ", ".join(sorted(worker.models)) or "unknown models"
            log.info("worker %s is ready: %s", worker.url, models)
        else:
            log.warning("worker %s is %s: %s", worker.url, state.value, worker.last_error)
        self._on_change(worker)


def _cards(body: bytes) -> list[dict[str, Any]]:
    """The models in an answer of /v1/models; [] if there is no such list."""
    try:
        told = orjson.loads(body)
    except orjson.JSONDecodeError:
        return []
    data = told.get("data") if isinstance(told, dict) else None
    if not isinstance(data, list):
        return []
    cards = [card for card in data if isinstance(card, dict) and isinstance(card.get("id"), str)]
    return cards[:MAX_MODELS]
