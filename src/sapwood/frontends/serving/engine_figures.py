"""Asks the engines for their status now and then, and keeps the latest answers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sapwood.base.errors import SapwoodError
from sapwood.observe.engine_facts import EngineConstants, EngineRates, EngineState, PoolConstants
from sapwood.observe.history import PERCENTILES, History, Sample
from sapwood.observe.requests import RequestObserver
from sapwood.schema.client import EngineClient
from sapwood.schema.output import EngineStatus, total_status

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


class ReplicaFigures:
    """The latest status of one engine, and rates between two of them."""

    def __init__(self, engine: EngineClient, state: EngineState, rank: int = 0) -> None:
        self._engine = engine
        self._before: _Reading | None = None
        self._latest: _Reading | None = None
        self._pending: asyncio.Task[EngineStatus] | None = None
        self.state = state
        self.rank = rank

    @property
    def status(self) -> EngineStatus | None:
        """The latest answer; None before the first."""
        return None if self._latest is None else self._latest.status

    @property
    def unavailable_reason(self) -> str | None:
        return self._engine.unavailable_reason

    def ask(self, max_age_s: float) -> asyncio.Task[EngineStatus] | None:
        """The question to the engine; None if the latest answer is younger than that."""
        self.state.is_up = self._engine.unavailable_reason is None
        if self._latest is not None and time.monotonic() - self._latest.at_s < max_age_s:
            return None
        if self._pending is None or self._pending.done():
            self._pending = asyncio.ensure_future(self._engine.status())
        return self._pending

    async def hear(self, question: asyncio.Task[EngineStatus] | None) -> bool:
        """Wait for the answer to a question; returns whether there is one, or none was needed."""
        if question is None:
            return True
        try:
            # Shielded: a question without an answer in time stays open, and is not asked twice.
            status = await asyncio.wait_for(asyncio.shield(question), PATIENCE_S)
            self._take(_Reading(time.monotonic(), status))
        except TimeoutError:
            return False
        except SapwoodError as error:
            log.debug("the engine's figures are not to be had: %s", error)
            return False
        return True

    def _take(self, reading: _Reading) -> None:
        self.state.constants = self._constants()
        self._latest = reading
        self.state.facts = reading.status
        before = self._before
        if before is None or reading.status.num_steps < before.status.num_steps:
            # The first status at all, or the first of an engine that was restarted.
            self._before = reading
            return
        elapsed_s = reading.at_s - before.at_s
        if elapsed_s >= MIN_INTERVAL_S:
            rates = _rates(before.status, reading.status, elapsed_s)
            last = rates.output_tokens_per_s or self.state.rates.last_output_tokens_per_s
            self.state.rates = replace(rates, last_output_tokens_per_s=last)
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


class EngineFigures:
    """The figures of all replicas of the model, of which there may be one.

    `run` asks once a second for as long as the server runs, and adds to `history`. Without it
    `refresh` still works.
    """

    def __init__(self, engines: Sequence[EngineClient], observer: RequestObserver) -> None:
        states = observer.metrics.engines
        states.extend(EngineState() for _ in range(len(engines) - len(states)))
        self.replicas = [
            ReplicaFigures(engine, state, rank)
            for rank, (engine, state) in enumerate(zip(engines, states, strict=True))
        ]
        self._observer = observer
        self.history = History()

    @property
    def status(self) -> EngineStatus | None:
        """The latest answers added up; None before the first."""
        told = [status for one in self.replicas if (status := one.status) is not None]
        return total_status(told) if told else None

    @property
    def constants(self) -> EngineConstants | None:
        """Those of the replicas that have answered, added up."""
        told = [facts for one in self.replicas if (facts := one.state.constants) is not None]
        return _total_constants(told) if told else None

    @property
    def rates(self) -> EngineRates:
        """Tokens per second of all replicas."""
        return _total_rates([one.state.rates for one in self.replicas])

    async def run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            if await self.refresh():
                self._observer.tick()
                self._add_sample()

    async def refresh(self, max_age_s: float = 0.0) -> bool:
        """Ask all engines, unless their latest answers are younger than that.

        Returns whether there is an answer that young now."""
        questions = [(one, one.ask(max_age_s)) for one in self.replicas]
        return any(await asyncio.gather(*(one.hear(question) for one, question in questions)))

    def _add_sample(self) -> None:
        status, rates = self.status, self.rates
        assert status is not None
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
    return EngineRates(
        output_tokens_per_s=(now.num_output_tokens - before.num_output_tokens) / elapsed_s,
        prompt_tokens_per_s=num_prefill / elapsed_s,
        cached_tokens_per_s=num_cached / elapsed_s,
    )


def _total_constants(each: Sequence[EngineConstants]) -> EngineConstants:
    """Sums, but the times and the page size of the first."""
    return replace(
        each[0],
        max_total_tokens=sum(one.max_total_tokens for one in each),
        max_running_requests=sum(one.max_running_requests for one in each),
        weight_bytes=sum(one.weight_bytes for one in each),
        pools=tuple(
            replace(same[0], size=sum(pool.size for pool in same))
            for same in zip(*(one.pools for one in each), strict=True)
        ),
    )


def _total_rates(each: Sequence[EngineRates]) -> EngineRates:
    return EngineRates(
        output_tokens_per_s=sum(one.output_tokens_per_s for one in each),
        last_output_tokens_per_s=sum(one.last_output_tokens_per_s for one in each),
        prompt_tokens_per_s=sum(one.prompt_tokens_per_s for one in each),
        cached_tokens_per_s=sum(one.cached_tokens_per_s for one in each),
    )
