"""One request's way through the gateway: read, wait for its turn, choose, send, pass on."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sapwood.base.errors import EngineUnavailable, SapwoodError
from sapwood.gateway import headers
from sapwood.gateway.client import Answer, WorkerFailure
from sapwood.gateway.fleet import Fleet
from sapwood.gateway.gate import Gate
from sapwood.gateway.metrics import GatewayMetrics, StreamTimes
from sapwood.gateway.policies.interface import Call
from sapwood.gateway.retries import RETRYABLE, WORKER_AT_FAULT, RetryBudget, RetryLimits
from sapwood.gateway.routing_fields import RoutingFields, routing_fields
from sapwood.gateway.worker import Worker
from sapwood.http.body import read_bytes
from sapwood.http.endpoints import EndpointTable
from sapwood.http.errors import ANTHROPIC_ERRORS, anthropic_body, native_body
from sapwood.http.routing import ROUTING_KEY_HEADER
from sapwood.http.sse import event

log = logging.getLogger(__name__)

MAX_KEY_BYTES = 1024
_ROUTING_KEY = ROUTING_KEY_HEADER.encode()


class BadGateway(SapwoodError):
    """The worker gave no answer, and so did those that were asked after it."""

    status = 502
    type = "BadGatewayError"


class GatewayTimeout(SapwoodError):
    """The request has taken too long in all."""

    status = 504
    type = "GatewayTimeoutError"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyLimits:
    """timeout_s: of a whole request; stream_idle_s: between two pieces of an answer, 0: no limit;
    pass_key: whether a client's key goes to workers without a key of their own"""

    timeout_s: float
    stream_idle_s: float
    pass_key: bool
    id_headers: tuple[bytes, ...]


@dataclass(slots=True, kw_only=True)
class Proxy:
    """Forwards requests to the workers of a fleet."""

    fleet: Fleet
    gate: Gate
    retries: RetryLimits
    budget: RetryBudget
    limits: ProxyLimits
    metrics: GatewayMetrics
    rng: random.Random = field(default_factory=random.Random)


class Forwarded(Response):
    """An answer that comes from a worker.

    The request is sent again after a failure, but never once its client has got a byte. When the
    client leaves, the worker's connection is closed, which aborts the request there.

    body    of the request, if it has been read already
    worker  the only one that can answer; None: the policy chooses
    """

    def __init__(
        self,
        proxy: Proxy,
        request: Request,
        *,
        body: bytes | None = None,
        worker: Worker | None = None,
    ) -> None:
        self._proxy = proxy
        self._request = request
        self._body = body
        self._only = worker
        self._started_s = time.perf_counter()
        self._has_begun = False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_bytes(self._request) if self._body is None else self._body
        watch = ClientWatch(receive)
        try:
            async with asyncio.timeout(self._proxy.limits.timeout_s):
                await self._answer(scope, body, send)
        except asyncio.CancelledError:
            if not watch.has_left:
                raise
            watch.uncancel()
            log.debug("the client left; its request is aborted")
            self._proxy.metrics.num_left += 1
        except TimeoutError:
            if not self._has_begun:
                raise GatewayTimeout(
                    f"the request was not answered within {self._proxy.limits.timeout_s:g} s; ask "
                    "for less, or start the gateway with a larger --request-timeout-secs"
                ) from None
            # Cut off, so that nobody takes a part for the whole.
            log.warning("an answer took more than %g s", self._proxy.limits.timeout_s)
        finally:
            watch.close()

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        proxy = self._proxy
        await proxy.gate.enter()
        try:
            exchange = _Exchange(proxy, scope, body, self._only)
            worker, answer = await exchange.first_answer()
            try:
                await self._pass_on(worker, answer, exchange.id, send)
            finally:
                answer.close()
                worker.end()
        finally:
            proxy.gate.leave()

    async def _pass_on(self, worker: Worker, answer: Answer, id_: bytes, send: Send) -> None:
        head = headers.returned(answer.headers, id_)
        self._has_begun = True
        await send({"type": "http.response.start", "status": answer.status, "headers": head})
        is_stream = not answer.is_complete
        if is_stream:
            answer.watch(self._proxy.limits.stream_idle_s)
        stream = StreamTimes(self._started_s) if is_stream else None
        last = b""
        try:
            while True:
                is_complete = answer.is_complete
                piece = answer.take()
                if piece or is_complete:
                    if stream is not None and piece:
                        stream.add(piece)
                    await send(
                        {"type": "http.response.body", "body": piece, "more_body": not is_complete}
                    )
                    last = piece or last
                if is_complete:
                    break
                await answer.more()
        except WorkerFailure as error:
            worker.breaker.failed(self._proxy.fleet.clock())
            worker.last_error = str(error)
            self._proxy.metrics.failed(worker, "broken_stream")
            await self._end_broken(worker, answer, error, last, send)
            return
        except BaseException:
            worker.breaker.ended()
            raise
        if answer.status in WORKER_AT_FAULT:
            worker.breaker.failed(self._proxy.fleet.clock())
        elif answer.status in RETRYABLE:
            worker.breaker.ended()
        else:
            worker.breaker.succeeded()
        self._proxy.metrics.answered(worker, answer.status, self._started_s, stream)

    async def _end_broken(
        self, worker: Worker, answer: Answer, error: WorkerFailure, last: bytes, send: Send
    ) -> None:
        """An event stream that breaks off between two events ends with an event that says so. All
        other answers are cut off, so that nobody takes a part for the whole."""
        log.warning("an answer of worker %s broke off: %s", worker.url, error)
        kind = headers.find(answer.headers, b"content-type") or b""
        if not kind.startswith(b"text/event-stream") or not last.endswith(b"\n\n"):
            return
        told = BadGateway(f"the worker's answer broke off: {error}; ask again")
        endpoints: EndpointTable = self._request.app.state.endpoints
        if endpoints.error_form(self._request.url.path) is ANTHROPIC_ERRORS:
            last_event = b"event: error\n" + event(anthropic_body(told))
        else:
            last_event = event(native_body(told))
        await send({"type": "http.response.body", "body": last_event, "more_body": False})


class _Exchange:
    """The attempts to get an answer to one request."""

    def __init__(self, proxy: Proxy, scope: Scope, body: bytes, only: Worker | None) -> None:
        self._proxy = proxy
        self._only = only
        self._body = body
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

    async def first_answer(self) -> tuple[Worker, Answer]:
        """The worker and its answer, of which only the head has come for certain.

        `answer.close`, `worker.end` and one of the breaker's three methods must follow. Raises
        BadGateway if all attempts failed, EngineUnavailable if no worker can be asked.
        """
        proxy = self._proxy
        proxy.budget.add_request()
        call, model = self._call()
        tried: set[str] = set()
        num_retries = 0
        while True:
            failure: SapwoodError
            worker: Worker | None = None
            try:
                worker = self._only or proxy.fleet.choose(
                    call, model=model, path=self._path, tried=tried
                )
                answer = await self._ask(worker)
            except WorkerFailure as error:
                assert worker is not None
                failure = BadGateway(f"worker {worker.id} failed: {error}; try again")
            except EngineUnavailable as error:
                failure = error
            else:
                if answer.status not in RETRYABLE or not self._may_retry(num_retries):
                    return worker, answer
                self._give_back(worker, answer)
                num_retries += 1
                tried.add(worker.id)
                await asyncio.sleep(proxy.retries.backoff_s(num_retries - 1, proxy.rng))
                continue
            if not self._may_retry(num_retries):
                raise failure
            num_retries += 1
            if worker is not None:
                tried.add(worker.id)
            await asyncio.sleep(proxy.retries.backoff_s(num_retries - 1, proxy.rng))

    def _call(self) -> tuple[Call, str | None]:
        fleet = self._proxy.fleet
        fields = RoutingFields()
        if self._body and (fleet.policy.needs_text or len(fleet.models) > 1):
            fields = routing_fields(self._body)
        key = headers.find(self._headers, _ROUTING_KEY) or b""
        return Call(text=fields.text, key=key[:MAX_KEY_BYTES].decode("latin-1")), fields.model

    async def _ask(self, worker: Worker) -> Answer:
        proxy = self._proxy
        head = headers.request_head(
            self._method,
            worker.origin.base_path + self._target,
            host=worker.host,
            headers=self._headers,
            extra=self._extra,
            num_body_bytes=len(self._body),
            own_key=worker.spec.api_key,
            pass_key=proxy.limits.pass_key,
        )
        proxy.metrics.chosen(worker)
        worker.begin()
        try:
            return await worker.ask(head, self._body)
        except WorkerFailure as error:
            worker.last_error = str(error)
            worker.breaker.failed(proxy.fleet.clock())
            worker.end()
            proxy.metrics.failed(worker, "no_answer")
            log.warning("worker %s failed a request: %s", worker.url, error)
            raise
        except BaseException:
            worker.breaker.ended()
            worker.end()
            raise

    def _give_back(self, worker: Worker, answer: Answer) -> None:
        """This answer is not passed on; the request is sent again."""
        if answer.status in WORKER_AT_FAULT:
            worker.breaker.failed(self._proxy.fleet.clock())
            worker.last_error = f"a request was answered with {answer.status}"
        else:
            worker.breaker.ended()
        answer.close()
        worker.end()
        self._proxy.metrics.failed(worker, str(answer.status))

    def _may_retry(self, num_retries: int) -> bool:
        proxy = self._proxy
        if num_retries >= proxy.retries.max_retries or not proxy.budget.take_retry():
            return False
        proxy.metrics.num_retries += 1
        return True


class ClientWatch:
    """Cancels the current task when the client leaves.

    The request's body must have been read before: then the next message can only be the disconnect.
    """

    def __init__(self, receive: Receive) -> None:
        self._task = asyncio.current_task()
        self.has_left = False
        self._watcher = asyncio.get_running_loop().create_task(self._watch(receive))

    def uncancel(self) -> None:
        assert self._task is not None
        self._task.uncancel()

    def close(self) -> None:
        self._task = None
        self._watcher.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        if self._task is not None:
            self.has_left = True
            self._task.cancel()
