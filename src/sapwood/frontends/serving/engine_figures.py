"""Asks the engine for its status now and then, and keeps the latest answer."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, replace

from sapwood.base.errors import SapwoodError
from sapwood.observe.history import PERCENTILES, History, Sample
from sapwood.observe.metrics import EngineConstants, EngineRates, PoolConstants
from sapwood.observe.requests import RequestObserver
from sapwood.schema.client import EngineClient
from sapwood.schema.output import EngineStatus

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
PATIENCE_S = 2.0
"""How long to wait for an engine in a long step; until it answers, the older figures are shown."""
MIN_INTERVAL_S = 0.5
"""Rates over shorter intervals would jump about."""


@dataclass(frozen=True, slots=True)
class _Reading:
    at_s: float
    status: EngineStatus


class EngineFigures:
    """The latest status of the engine, and rates between two of them.

    `run` asks once a second for as long as the server runs, and adds to `history`. Without it
    `refresh` still works.
    """

    def __init__(self, engine: EngineClient, observer: RequestObserver) -> None:
        self._engine = engine
        self._observer = observer
        self._state = observer.metrics.engine
        self._before: _Reading | None = None
        self._latest: _Reading | None = None
        self._pending: asyncio.Task[EngineStatus] | None = None
        self.history = History()

    @property
    def status(self) -> EngineStatus | None:
        """The latest answer; None before the first."""
        return None if self._latest is None else self._latest.status

    async def run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            if await self.refresh():
                self._observer.tick()
                self._add_sample()

    async def refresh(self, max_age_s: float = 0.0) -> bool:
        """Ask the engine, unless the latest answer is younger than that.

        Returns whether there is an answer that young now.
        """
        if self._latest is not None and time.monotonic() - self._latest.at_s < max_age_s:
            return True
        try:
            if self._pending is None or self._pending.done():
                self._pending = asyncio.ensure_future(self._engine.status())
            # Shielded: a question without an answer in time stays open, and is not asked twice.
            status = await asyncio.wait_for(asyncio.shield(self._pending), PATIENCE_S)
            self._take(_Reading(time.monotonic(), status))
        except TimeoutError:
            return False
        except SapwoodError as error:
            log.debug("the engine's figures are not to be had: %s", error)
            return False
        return True

    def _take(self, reading: _Reading) -> None:
        self._state.constants = self._constants()
        self._latest = reading
        self._state.facts = reading.status
        before = self._before
        if before is None or reading.status.num_steps < before.status.num_steps:
            # The first status at all, or the first of an engine that was restarted.
            self._before = reading
            return
        elapsed_s = reading.at_s - before.at_s
        if elapsed_s >= MIN_INTERVAL_S:
            rates = _rates(before.status, reading.status, elapsed_s)
            last = rates.output_tokens_per_s or self._state.rates.last_output_tokens_per_s
            self._state.rates = replace(rates, last_output_tokens_per_s=last)
            self._before = reading

    def _constants(self) -> EngineConstants:
        info = self._engine.info
        return EngineConstants(
            page_size=info.page_size,
            max_total_tokens=info.max_total_tokens,
            max_running_requests=info.max_running_requests,
            startup_s=info.startup_s,
            load_s=info.load_s,
            weight_bytes=info.weight_bytes,
            pools=tuple(
                PoolConstants(name=pool.name, size=pool.size, unit_bytes=pool.unit_bytes)
                for pool in info.pools
            ),
        )

    def _add_sample(self) -> None:
        assert self._latest is not None
        status, rates = self._latest.status, self._state.rates
        sample = Sample(
            at_s=time.time(),
            num_running=status.num_running,
            num_waiting=status.num_waiting,
            output_tokens_per_s=rates.output_tokens_per_s,
            prompt_tokens_per_s=rates.prompt_tokens_per_s,
            cache_hit_rate=rates.cache_hit_rate,
            token_usage=status.num_leased_pages / max(status.num_pages, 1),
            ttft_s=self._observer.ttft.percentiles(PERCENTILES),
            itl_s=self._observer.itl.percentiles(PERCENTILES),
        )
        self.history.add(sample)


def _rates(before: EngineStatus, now: EngineStatus, elapsed_s: float) -> EngineRates:
    num_prefill = now.num_prefill_tokens - before.num_prefill_tokens
    num_cached = now.num_cached_tokens - before.num_cached_tokens
    num_prompt = num_prefill + num_cached
    return EngineRates(
        output_tokens_per_s=(now.num_output_tokens - before.num_output_tokens) / elapsed_s,
        prompt_tokens_per_s=num_prefill / elapsed_s,
        cache_hit_rate=num_cached / num_prompt if num_prompt else None,
    )
