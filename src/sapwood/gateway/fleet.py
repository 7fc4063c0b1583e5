"""All workers: added, watched, chosen for requests, changed, drained and removed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal

import msgspec

from sapwood.base.errors import EngineUnavailable, InvalidRequest, NotFound, UnsupportedFeature
from sapwood.gateway.breaker import BreakerLimits
from sapwood.gateway.client import Origin, tls_context
from sapwood.gateway.health import HealthWatch
from sapwood.gateway.link import Link
from sapwood.gateway.parts_keeper import NoParts, PartsKeeper
from sapwood.gateway.policies.interface import Policy, PrefixCounts
from sapwood.gateway.worker import Worker, WorkerSpec, WorkerState, WorkerType, worker_id
from sapwood.schema.config.gateway import GatewayConfig

log = logging.getLogger(__name__)

MAX_WORKERS = 4096
MAX_CONTEXT = 2**31 - 1
FIXED = (
    *("url", "runtime", "model_id", "worker_type"),
    *("tokenizer_path", "chat_template", "tool_parser", "reasoning_parser"),
)
"""Fields of a worker that cannot be changed while it is there."""

Clock = Callable[[], float]
Reached = Literal["http", "tokens", "link"]
"""Which workers can be asked: those that take the request as it is, by HTTP; all, since it consists
of token ids; or only those that have a link."""


class Fleet:
    """The workers and the policies that choose among them.

    policies    of each type of workers; workers of other types are refused
    clock       seconds of a monotonic clock, for circuit breakers
    on_removed  called when a worker is gone
    on_change   called when a worker's state has changed, or what it serves
    parts       holds the tokenizers and parsers that workers bring
    """

    def __init__(
        self,
        config: GatewayConfig,
        policies: Mapping[WorkerType, Policy],
        *,
        clock: Clock = time.monotonic,
        on_removed: Callable[[Worker], None] = lambda worker: None,
        on_change: Callable[[Worker], None] = lambda worker: None,
        parts: PartsKeeper | None = None,
    ) -> None:
        self.policies = policies
        self.clock = clock
        self._on_removed = on_removed
        self._on_change = on_change
        self._parts = parts or NoParts()
        self._config = config
        files = (config.worker_ca_certs, config.worker_certfile, config.worker_keyfile)
        # Read at once, so that a wrong file ends the start; without files only TLS needs a context.
        self._tls = tls_context(*files) if any(files) else None
        self._workers: dict[str, Worker] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._models: frozenset[str] = frozenset()
        self._base_models: frozenset[str] = frozenset()
        self._contexts: dict[str, int] = {}
        self._has_links = False

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def models(self) -> frozenset[str]:
        """The models that the workers have said they serve."""
        return self._models

    @property
    def base_models(self) -> frozenset[str]:
        """The models without the adapters of models."""
        return self._base_models

    @property
    def max_model_len(self) -> int | None:
        """The shortest context of the workers, in tokens; None: none says how long its own is."""
        return min(self._contexts.values(), default=None)

    def context_of(self, model: str) -> int | None:
        """The shortest context of the workers that serve the model; "": of all workers."""
        return self._contexts.get(model) if model else self.max_model_len

    @property
    def is_ready(self) -> bool:
        """Whether there is a worker of each type that can take requests."""
        ready = {worker.spec.worker_type for worker in self if worker.state is WorkerState.READY}
        return ready == set(self.policies)

    @property
    def readiness(self) -> str:
        """ "ok", or what there is none of."""
        if self.is_ready:
            return "ok"
        return "no pair of workers is ready" if self.has_pairs else "no worker is ready"

    @property
    def prefixes(self) -> PrefixCounts | None:
        """What was found of prompts, by the policy for those who read them."""
        return next(iter(self.policies.values())).prefixes

    @property
    def has_pairs(self) -> bool:
        """Whether one worker reads a prompt and another one generates the answer."""
        return "prefill" in self.policies

    @property
    def has_links(self) -> bool:
        """Whether there are workers that are not reached by HTTP."""
        return self._has_links

    @property
    def needs_text(self) -> bool:
        return any(policy.needs_text for policy in self.policies.values())

    def find(self, id_: str) -> Worker:
        found = self._workers.get(id_)
        if found is None:
            raise NotFound(f"there is no worker {id_[:100]!r}; GET /workers lists all")
        return found

    def add(self, spec: WorkerSpec) -> Worker:
        """The new worker, which gets requests once it is healthy. InvalidRequest if it is known."""
        spec.check()
        if spec.worker_type not in self.policies:
            types = " or ".join(self.policies)
            raise InvalidRequest(
                f"this gateway's workers are of the type {types}, not {spec.worker_type}; the "
                "option --pd-disaggregation decides",
                param="worker_type",
            )
        if worker_id(spec.url) in self._workers:
            raise InvalidRequest(
                f"there is a worker at {spec.url} already; change it by PUT /workers/"
                f"{worker_id(spec.url)}",
                param="url",
            )
        if len(self) >= MAX_WORKERS:
            raise InvalidRequest(f"there are {MAX_WORKERS} workers, which is the limit")
        config = self._config
        worker = Worker(
            spec,
            breaker_limits=BreakerLimits(
                failures=config.cb_failure_threshold,
                successes=config.cb_success_threshold,
                open_s=config.cb_timeout_duration_secs,
                is_off=config.disable_circuit_breaker,
            ),
            connect_timeout_s=config.worker_connect_timeout_secs,
            tls=self._tls,
            link=self._link(Origin.parse(spec.url)),
        )
        self._parts.add(worker)
        self._workers[worker.id] = worker
        watch = HealthWatch(worker, config, self._changed, self._parts.prepare)
        self._start_task(worker, watch.run())
        self._changed(worker)
        return worker

    def update(self, id_: str, changes: dict[str, Any]) -> Worker:
        """Change fields of a worker's spec; `FIXED` ones stay."""
        worker = self.find(id_)
        for name in FIXED:
            if name in changes:
                raise InvalidRequest(
                    f"{name} cannot be changed; remove the worker and add another", param=name
                )
        spec = spec_of({**msgspec.to_builtins(worker.spec), **changes})
        spec.check()
        worker.spec = spec
        return worker

    def remove(self, id_: str) -> Worker:
        """The worker, which gets no more requests; it is gone when its open ones have ended."""
        worker = self.find(id_)
        if worker.state is not WorkerState.DRAINING:
            worker.move_to(WorkerState.DRAINING)
            self._tasks.pop(id_).cancel()
            self._start_task(worker, self._drain(worker))
            self._changed(worker)
        return worker

    def candidates(
        self,
        *,
        model: str | None,
        path: str,
        tried: Collection[str] = (),
        kind: WorkerType = "regular",
        by: Reached = "http",
    ) -> list[Worker]:
        """Workers for the request, at least one; those that it was not sent to, if there are any.

        Raises NotFound if no worker serves the model, UnsupportedFeature if it cannot be reached in
        that way, EngineUnavailable if none can take it now.
        """
        serving = [
            worker
            for worker in self
            if worker.spec.worker_type == kind and worker.serves_path(path)
        ]
        # Only where workers serve different models the gateway must look at the name.
        if model is not None and len(self._models) > 1:
            serving = [worker for worker in serving if worker.serves_model(model)]
            if not serving:
                known = ", ".join(sorted(self._models)[:20])
                raise NotFound(f"no worker serves the model {model[:200]!r}; they serve: {known}")
        reached = [worker for worker in serving if _is_reached(worker, by)]
        if serving and not reached:
            raise UnsupportedFeature(
                f"{path} is not possible for this model: its workers are reached by gRPC, which "
                "knows only token ids; add workers that are reached by HTTP, or for texts and "
                "chats give the gateway a tokenizer by --tokenizer-path"
            )
        serving = reached
        now_s = self.clock()
        open_ = [worker for worker in serving if worker.admits(now_s)]
        candidates = [worker for worker in open_ if worker.id not in tried] or open_
        if not candidates:
            raise self._nobody(serving, kind)
        best = max((worker.spec.priority, worker.precedence) for worker in candidates)
        return [
            worker for worker in candidates if (worker.spec.priority, worker.precedence) == best
        ]

    def makes_tokens(self, model: str) -> bool:
        """Whether requests about a model are to be made of token ids: it has workers with a link,
        and none of those that come before them."""
        if not self._has_links:
            return False
        serving = [
            worker
            for worker in self
            if not model or len(self._models) < 2 or worker.serves_model(model)
        ]
        if not any(worker.link is not None for worker in serving):
            return False
        return not any(
            worker.precedence > 1 and worker.state is WorkerState.READY for worker in serving
        )

    def forget(self, worker: Worker) -> None:
        """The worker holds no prefixes any more."""
        self.policies[worker.spec.worker_type].forget(worker.id)

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(worker.close() for worker in self))

    def _link(self, origin: Origin) -> Link | None:
        """InvalidRequest if what it needs is not installed."""
        if not origin.is_rpc:
            return None
        try:
            from sapwood.gateway.rpc.link import RpcLink
        except ImportError as error:
            raise InvalidRequest(
                "workers that are reached by gRPC need the packages grpcio and protobuf at the "
                "gateway; install them with `pip install grpcio protobuf`",
                param="url",
            ) from error
        config = self._config
        files = (config.worker_ca_certs, config.worker_keyfile, config.worker_certfile)
        return RpcLink(origin, connect_timeout_s=config.worker_connect_timeout_secs, files=files)

    def _nobody(self, serving: list[Worker], kind: WorkerType) -> EngineUnavailable:
        if not self._workers:
            option = f"--{kind}" if self.has_pairs else "--worker-urls"
            return EngineUnavailable(
                f"the gateway has no workers; add one by POST /workers or start it with {option}"
            )
        now_s = self.clock()
        counts: dict[str, int] = {}
        for worker in serving:
            state = worker.state.value
            if worker.state is WorkerState.READY:
                state = f"breaker {worker.breaker.state(now_s).name.lower().replace('_', ' ')}"
            counts[state] = counts.get(state, 0) + 1
        told = ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "none"
        name = f"{kind} worker" if self.has_pairs else "worker"
        return EngineUnavailable(f"no {name} can take the request now: {told}; try again later")

    async def _drain(self, worker: Worker) -> None:
        try:
            async with asyncio.timeout(self._config.drain_timeout):
                await worker.idle.wait()
        except TimeoutError:
            log.warning(
                "worker %s is removed with %d open requests, which end now",
                worker.url,
                worker.num_open,
            )
        worker.move_to(WorkerState.REMOVED)
        await worker.close()
        self.forget(worker)
        self._parts.remove(worker)
        del self._workers[worker.id]
        self._tasks.pop(worker.id)
        self._changed(worker)
        self._on_removed(worker)
        log.info("worker %s is removed", worker.url)

    def _start_task(self, worker: Worker, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[worker.id] = task
        task.add_done_callback(_log_failure)

    def _changed(self, worker: Worker) -> None:
        self._models = frozenset().union(*(worker.models for worker in self))
        self._has_links = any(worker.link is not None for worker in self)
        self._base_models = frozenset().union(*(worker.base_models for worker in self))
        self._contexts = {}
        for card in (card for worker in self for card in worker.cards):
            model, length = str(card["id"]), card.get("max_model_len")
            if isinstance(length, int) and 0 < length <= MAX_CONTEXT:
                self._contexts[model] = min(length, self._contexts.get(model, length))
        if worker.state is WorkerState.UNHEALTHY:
            # Whoever comes back from being down has probably an empty cache.
            self.forget(worker)
        self._on_change(worker)


def _is_reached(worker: Worker, by: Reached) -> bool:
    return by == "tokens" or (worker.link is not None) == (by == "link")


def spec_of(told: object) -> WorkerSpec:
    """A worker's spec from parsed JSON; InvalidRequest if it is none."""
    try:
        return msgspec.convert(told, WorkerSpec)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"this is no worker: {error}") from None


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("watching a worker failed", exc_info=task.exception())
