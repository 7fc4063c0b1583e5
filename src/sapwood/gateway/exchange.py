"""The attempts to get an answer to one request: choose, send, and send again after a failure."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from starlette.types import Scope

from sapwood.base.errors import EngineUnavailable, SapwoodError
from sapwood.gateway import headers
from sapwood.gateway.client import Answer, NotConnected, WorkerFailure
from sapwood.gateway.fleet import Fleet, Reached
from sapwood.gateway.gate import Gate
from sapwood.gateway.later import Later
from sapwood.gateway.link import Metadata, TokenAnswer
from sapwood.gateway.metrics import GatewayMetrics
from sapwood.gateway.policies.interface import Call
from sapwood.gateway.retries import RETRYABLE, WORKER_AT_FAULT, RetryBudget, RetryLimits
from sapwood.gateway.routing_fields import RoutingFields, form_fields, routing_fields
from sapwood.gateway.spans import TRACE_HEADERS, RequestSpan
from sapwood.gateway.worker import Worker, WorkerType
from sapwood.http.raw_headers import RawHeaders, find
from sapwood.http.routing import ROUTING_KEY_HEADER
from sapwood.observe.tracing import Tracing
from sapwood.schema.limits import ROUTING_KEY

log = logging.getLogger(__name__)

WATCH_AFTER_S = 0.02
"""A client that leaves earlier is noticed then."""
_ROUTING_KEY = ROUTING_KEY_HEADER.encode()
_PICTURES = "/v1/images/"
_FORWARDED_HOST = b"x-forwarded-host"


class BadGateway(SapwoodError):
    """The worker gave no answer, and so did those that were asked after it."""

    status = 502
    type = "BadGatewayError"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyLimits:
    """timeout_s: of a whole request; stream_idle_s: between two pieces of an answer, 0: no limit;
    pass_key: whether a client's key goes to workers without a key of their own"""

    timeout_s: float
    stream_idle_s: float
    pass_key: bool
    id_headers: tuple[bytes, ...]


class StickyKeys(Protocol):
    """Which worker a routing key has, at several gateways."""

    async def settle(self, key: str, chosen: str, candidates: Sequence[str]) -> str:
        """The id of the key's worker, one of the candidates; `chosen` if it had none of them."""
        ...


class Prompts(Protocol):
    """Reads prompts for the policies, better than as their JSON spells them."""

    async def fields(self, path: str, body: bytes) -> RoutingFields | None:
        """None: there is nothing better."""
        ...


@dataclass(slots=True, kw_only=True)
class Proxy:
    """Forwards requests to the workers of a fleet.

    sticky   what other gateways say of routing keys, for the types of workers that have any
    prompts  reads prompts for the policies; None: they see what is spelled
    watching, deadlines  when requests' clients begin to be watched, and when their time is up
    """

    fleet: Fleet
    gate: Gate
    retries: RetryLimits
    budget: RetryBudget
    limits: ProxyLimits
    metrics: GatewayMetrics
    rng: random.Random = field(default_factory=random.Random)
    tracing: Tracing | None = None
    prompts: Prompts | None = None
    sticky: Mapping[WorkerType, StickyKeys] = field(default_factory=dict)
    watching: Later = field(init=False, default_factory=lambda: Later(WATCH_AFTER_S))
    deadlines: Later = field(init=False)

    def __post_init__(self) -> None:
        self.deadlines = Later(self.limits.timeout_s)


class Merge(Protocol):
    """Puts something into an answer on its way."""

    def passed(self, piece: bytes, *, is_complete: bool) -> bytes:
        """What of the answer can be passed on now that this piece has come."""
        ...


class Peer(Protocol):
    """A second worker's part in a request, which goes on beside the answer."""

    async def finish(self) -> None:
        """Wait for its end, but not for long."""
        ...

    def close(self) -> None:
        """End it, if it has not ended."""
        ...


class Headed(Protocol):
    """An answer whose beginning has come."""

    @property
    def status(self) -> int: ...
    def close(self) -> None: ...


A = TypeVar("A", bound=Headed)
H = TypeVar("H", bound=Headed)


@dataclass(slots=True, kw_only=True)
class Taken(Generic[A]):
    """An answer that is passed on, of which only the head has come for certain.

    `close` must follow, and before it one of the three methods of the worker's breaker.
    """

    worker: Worker
    answer: A
    peer: Peer | None = None
    merge: Merge | None = None

    def close(self) -> None:
        self.answer.close()
        self.worker.end()
        if self.peer is not None:
            self.peer.close()


class Failed(Exception):
    """An attempt has failed: this worker gave no answer."""

    def __init__(self, worker: Worker, failure: WorkerFailure) -> None:
        super().__init__(str(failure))
        self.worker = worker


class Way(Protocol[A]):
    """How one request is answered: by one worker, or by several.

    body  of the request, for the policies
    """

    @property
    def body(self) -> bytes: ...

    async def attempt(self, exchange: Exchange[Any], tried: set[str]) -> Taken[A]:
        """Ask workers once. Raises Failed, or EngineUnavailable if there is nobody to ask."""
        ...


@dataclass(frozen=True, slots=True)
class OneWorker:
    """One worker answers.

    only  the only one that can; None: the policy chooses
    kind  among which workers
    """

    body: bytes
    only: Worker | None = None
    kind: WorkerType = "regular"

    async def attempt(self, exchange: Exchange[Any], tried: set[str]) -> Taken[Answer]:
        worker = self.only or await exchange.choose(self.kind, tried)
        return Taken(worker=worker, answer=await exchange.ask(worker, self.body))


class Exchange(Generic[A]):
    """One request, until there is an answer.

    fields  what policies see of the request; None: what its body shows
    span    the request in a trace; None: it is not traced
    """

    def __init__(
        self, proxy: Proxy, scope: Scope, way: Way[A], fields: RoutingFields | None = None
    ) -> None:
        self.proxy = proxy
        self._way = way
        self._method: str = "GET" if scope["method"] == "HEAD" else scope["method"]
        self._path: str = scope["path"]
        query: bytes = scope["query_string"]
        self._target: bytes = scope["raw_path"] + (b"?" + query if query else b"")
        self._headers: list[tuple[bytes, bytes]] = scope["headers"]
        limits = proxy.limits
        self.id = headers.request_id(
            self._headers, limits.id_headers, os.urandom(16).hex().encode()
        )
        client = scope.get("client")
        self._extra = [(headers.REQUEST_ID, self.id)]
        if client is not None:
            self._extra.append((b"x-forwarded-for", str(client[0]).encode("ascii", "replace")))
        if self._path.startswith(_PICTURES) and not find(self._headers, _FORWARDED_HOST, b""):
            # The worker tells where its pictures are; that is here, for the client.
            self._extra.append((_FORWARDED_HOST, find(self._headers, b"host", b"")))
            self._extra.append((b"x-forwarded-proto", str(scope.get("scheme", "http")).encode()))
        self._call, self._model = self._call_and_model(fields)
        self.span: RequestSpan | None = None

    async def first_answer(self) -> Taken[A]:
        """The answer that is passed on.

        Raises BadGateway if all attempts failed, EngineUnavailable if no worker can be asked.
        """
        proxy = self.proxy
        proxy.budget.add_request()
        tried: set[str] = set()
        num_retries = 0
        while True:
            failure: SapwoodError
            try:
                taken = await self._way.attempt(self, tried)
            except Failed as error:
                tried.add(error.worker.id)
                failure = BadGateway(f"worker {error.worker.id} failed: {error}; try again")
                if not self._may_retry(num_retries):
                    raise failure from error
            except EngineUnavailable:
                if not self._may_retry(num_retries):
                    raise
            else:
                if taken.answer.status not in RETRYABLE or not self._may_retry(num_retries):
                    return taken
                tried.add(taken.worker.id)
                self._give_back(taken)
            num_retries += 1
            await asyncio.sleep(proxy.retries.backoff_s(num_retries - 1, proxy.rng))

    async def choose(self, kind: WorkerType, tried: set[str], *, by: Reached = "http") -> Worker:
        """A worker of that type, by its policy. Raises EngineUnavailable, NotFound."""
        fleet, key = self.proxy.fleet, self._call.key
        candidates = fleet.candidates(
            model=self._model, path=self._path, tried=tried, kind=kind, by=by
        )
        chosen = fleet.policies[kind].choose(candidates, self._call)
        sticky = self.proxy.sticky.get(kind)
        if sticky is None or not key:
            return chosen
        by_id = {worker.id: worker for worker in candidates}
        # The key's worker for prompts is another one than that for answers.
        return by_id[await sticky.settle(f"{kind}:{key}", chosen.id, list(by_id))]

    async def ask(
        self, worker: Worker, body: bytes, *, without: frozenset[bytes] = frozenset()
    ) -> Answer:
        """Send the request with this body, and wait for the answer's head.

        `answer.close`, `worker.end` and one of the breaker's three methods must follow.

        without  names of the client's headers that this request shall not have
        Raises Failed.
        """

        async def send(traced: RawHeaders) -> Answer:
            dropped = without | TRACE_HEADERS if traced else without
            sent = self._headers
            if dropped:
                sent = [pair for pair in sent if pair[0] not in dropped]
            head = headers.request_head(
                self._method,
                worker.origin.base_path + self._target,
                host=worker.host,
                headers=sent,
                extra=[*self._extra, *traced],
                num_body_bytes=len(body),
                own_key=worker.spec.api_key,
                pass_key=self.proxy.limits.pass_key,
            )
            return await worker.ask(head, body)

        return await self._traced(worker, send)

    async def ask_by_link(
        self, worker: Worker, send: Callable[[Metadata], Awaitable[TokenAnswer]]
    ) -> TokenAnswer:
        """The same by the worker's link; `send` gets what goes with the request."""

        async def sending(traced: RawHeaders) -> TokenAnswer:
            given = headers.metadata(
                self._headers,
                extra=[*self._extra, *traced],
                own_key=worker.spec.api_key,
                pass_key=self.proxy.limits.pass_key,
            )
            return await send(given)

        return await self._traced(worker, sending)

    async def _traced(self, worker: Worker, send: Callable[[RawHeaders], Awaitable[H]]) -> H:
        if self.span is None:
            return await self._counted(worker, send(()))
        with self.span.attempt(worker) as attempt:
            answer = await self._counted(worker, send(attempt.headers))
            attempt.answered(answer.status)
            return answer

    async def _counted(self, worker: Worker, sent: Awaitable[H]) -> H:
        """The answer, with the worker's part in it counted. Raises Failed."""
        self.proxy.metrics.chosen(worker)
        worker.begin()
        try:
            return await sent
        except WorkerFailure as error:
            self.no_answer(worker, error)
            worker.end()
            raise Failed(worker, error) from error
        except BaseException:
            worker.breaker.ended()
            worker.end()
            raise

    def no_answer(self, worker: Worker, error: WorkerFailure) -> None:
        """Count that the worker has failed the request."""
        worker.last_error = str(error)
        unreachable = isinstance(error, NotConnected)
        worker.breaker.failed(self.proxy.fleet.clock(), unreachable=unreachable)
        self.proxy.metrics.failed(worker, "no_answer")
        log.warning("worker %s failed a request: %s", worker.url, error)

    def _call_and_model(self, fields: RoutingFields | None) -> tuple[Call, str | None]:
        """InvalidRequest if the routing key is longer than a worker would take."""
        fleet, body = self.proxy.fleet, self._way.body
        if fields is None:
            is_needed = body and (fleet.needs_text or len(fleet.models) > 1)
            kind = find(self._headers, b"content-type", b"")
            if not is_needed:
                fields = RoutingFields()
            elif kind[:10].lower() == b"multipart/":
                fields = form_fields(body, kind)
            else:
                fields = routing_fields(body)
        key = find(self._headers, _ROUTING_KEY, b"").decode("latin-1")
        ROUTING_KEY.check(len(key), f"the header {ROUTING_KEY_HEADER}")
        return Call(text=fields.text, ids=fields.ids, key=key), fields.model

    def _give_back(self, taken: Taken[A]) -> None:
        """This answer is not passed on; the request is sent again."""
        worker, status = taken.worker, taken.answer.status
        if status in WORKER_AT_FAULT:
            worker.breaker.failed(self.proxy.fleet.clock())
            worker.last_error = f"a request was answered with {status}"
        else:
            worker.breaker.ended()
        taken.close()
        self.proxy.metrics.failed(worker, str(status))

    def _may_retry(self, num_retries: int) -> bool:
        proxy = self.proxy
        if num_retries >= proxy.retries.max_retries or not proxy.budget.take_retry():
            return False
        proxy.metrics.num_retries += 1
        return True
