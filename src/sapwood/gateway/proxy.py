"""One request's way through the gateway: read, wait for its turn, ask, pass on."""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sapwood.base.errors import SapwoodError
from sapwood.gateway import headers
from sapwood.gateway.client import Answer, PeerFailure, WorkerFailure
from sapwood.gateway.exchange import BadGateway, Exchange, Proxy, Taken
from sapwood.gateway.metrics import EVENT, StreamTimes
from sapwood.gateway.pairs import way_of
from sapwood.gateway.retries import RETRYABLE, WORKER_AT_FAULT
from sapwood.gateway.spans import request_span
from sapwood.gateway.worker import Worker
from sapwood.http.body import read_bytes
from sapwood.http.endpoints import EndpointTable
from sapwood.http.errors import ANTHROPIC_ERRORS, anthropic_body, native_body
from sapwood.http.sse import event

log = logging.getLogger(__name__)


class GatewayTimeout(SapwoodError):
    """The request has taken too long in all."""

    status = 504
    type = "GatewayTimeoutError"


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
        watch = ClientWatch(receive, self._proxy)
        try:
            await self._answer(scope, body, send)
        except asyncio.CancelledError:
            if not watch.has_cancelled():
                raise
            if watch.has_left:
                log.debug("the client left; its request is aborted")
                self._proxy.metrics.num_left += 1
                return
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
            way = way_of(proxy.fleet, scope, body, self._only)
            fields = None
            if proxy.prompts is not None and proxy.fleet.needs_text:
                fields = await proxy.prompts.fields(scope["path"], body)
            exchange = Exchange(proxy, scope, way, fields)
            with request_span(proxy.tracing, scope, exchange.id) as exchange.span:
                taken = await exchange.first_answer()
                if exchange.span is not None:
                    exchange.span.answered(taken.answer.status)
                try:
                    await self._pass_on(taken, exchange.id, send)
                finally:
                    taken.close()
        finally:
            proxy.gate.leave()

    async def _pass_on(self, taken: Taken[Answer], id_: bytes, send: Send) -> None:
        worker, answer, merge = taken.worker, taken.answer, taken.merge
        head = headers.returned(answer.headers, id_)
        if merge is not None:
            head = [(name, value) for name, value in head if name != b"content-length"]
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
                if merge is not None:
                    piece = merge.passed(piece, is_complete=is_complete)
                if piece or is_complete:
                    if stream is not None and piece:
                        stream.add(piece.count(EVENT))
                    await send(
                        {"type": "http.response.body", "body": piece, "more_body": not is_complete}
                    )
                    last = piece or last
                if is_complete:
                    break
                await answer.more()
        except WorkerFailure as error:
            if isinstance(error, PeerFailure):
                worker.breaker.ended()
            else:
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
        if taken.peer is not None:
            await taken.peer.finish()

    async def _end_broken(
        self, worker: Worker, answer: Answer, error: WorkerFailure, last: bytes, send: Send
    ) -> None:
        """An event stream that breaks off between two events ends with an event that says so. All
        other answers are cut off, so that nobody takes a part for the whole."""
        log.warning("an answer of worker %s broke off: %s", worker.url, error)
        if not headers.is_event_stream(answer.headers) or not last.endswith(b"\n\n"):
            return
        told = BadGateway(f"the worker's answer broke off: {error}; ask again")
        endpoints: EndpointTable = self._request.app.state.endpoints
        if endpoints.error_form(self._request.url.path) is ANTHROPIC_ERRORS:
            last_event = b"event: error\n" + event(anthropic_body(told))
        else:
            last_event = event(native_body(told))
        await send({"type": "http.response.body", "body": last_event, "more_body": False})


class ClientWatch:
    """Cancels the current task when the client leaves, or when the request's time is up.

    The request's body must have been read before: then the next message can only be the disconnect.
    A task waits for that message, but only once the request has run for a while: most short ones
    are answered before, and their clients are still there.
    """

    def __init__(self, receive: Receive, proxy: Proxy) -> None:
        self._task = asyncio.current_task()
        self._receive = receive
        self._proxy = proxy
        self._watcher: asyncio.Task[None] | None = None
        self.has_left = False
        self.is_late = False
        self._begins = proxy.watching.add(self._begin)
        self._ends = proxy.deadlines.add(self._give_up)

    def has_cancelled(self) -> bool:
        """Whether the task was cancelled from here and from nowhere else; it goes on then."""
        if self._task is None or not (self.has_left or self.is_late):
            return False
        return self._task.uncancel() == 0

    def close(self) -> None:
        self._task = None
        self._proxy.watching.discard(self._begins)
        self._proxy.deadlines.discard(self._ends)
        if self._watcher is not None:
            self._watcher.cancel()

    def _begin(self) -> None:
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue
        if self._task is not None and not self.is_late:
            self.has_left = True
            self._task.cancel()

    def _give_up(self) -> None:
        if self._task is not None and not self.has_left:
            self.is_late = True
            self._task.cancel()
