"""All workers of a model as one engine: token ids go in, token ids come out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from starlette.types import Scope

from sapwood.base.errors import EngineUnavailable, SapwoodError, UnsupportedFeature
from sapwood.gateway.client import PeerFailure, WorkerFailure
from sapwood.gateway.exchange import BadGateway, Exchange, Proxy, Taken
from sapwood.gateway.link import TokenAnswer
from sapwood.gateway.metrics import StreamTimes
from sapwood.gateway.plain.generate import MalformedAnswer
from sapwood.gateway.plain.way import TokenWay
from sapwood.gateway.proxy import GatewayTimeout
from sapwood.gateway.retries import RETRYABLE, WORKER_AT_FAULT
from sapwood.gateway.routing_fields import RoutingFields, packed_ids
from sapwood.gateway.spans import request_span
from sapwood.schema.output import (
    CacheFlushed,
    CallDone,
    EngineReady,
    EngineStatus,
    Finish,
    RequestOutput,
)
from sapwood.schema.request import (
    Generate,
    OrderWeights,
    RecordExperts,
    SentAdapter,
    StartProfile,
    SteerTiers,
)

log = logging.getLogger(__name__)

PATH = "/generate"
UNKNOWN_CONTEXT = 1 << 20
"""Tokens that a prompt may have where no worker says; the engine refuses what is too long."""
_NOT_SENT = frozenset({b"content-type", b"content-encoding", b"accept", b"accept-encoding"})


class PlainEngine:
    """The workers of a model, for one request of a client.

    Each sample is a request of its own to /generate, chosen, limited and sent again like any other.

    scope   of the client's request, whose headers go to the workers
    model   what the client asks for; "": whatever the workers serve
    """

    def __init__(self, proxy: Proxy, scope: Scope, model: str) -> None:
        self._proxy = proxy
        self._model = model
        self._max_model_len = proxy.fleet.context_of(model)
        kept = [pair for pair in scope["headers"] if pair[0] not in _NOT_SENT]
        self._scope = {
            **scope,
            "method": "POST",
            "path": PATH,
            "raw_path": PATH.encode(),
            "query_string": b"",
            "headers": [*kept, (b"content-type", b"application/json")],
        }

    @property
    def info(self) -> EngineReady:
        context_length = self._max_model_len or UNKNOWN_CONTEXT
        return EngineReady(
            context_length=context_length,
            max_total_tokens=context_length,
            page_size=1,
            notes=[],
        )

    @property
    def unavailable_reason(self) -> str | None:
        return None  # asking the workers tells

    async def generate(self, request: Generate) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of one sample. Closing the generator ends the request at its worker."""
        proxy = self._proxy
        way = TokenWay(self._scope, request, self._model, self._max_new_tokens(request))
        try:
            await proxy.gate.enter()
            try:
                fields = RoutingFields(self._model or None)
                if proxy.fleet.needs_text:
                    ids = request.prompt_ids
                    spelled = b"" if request.options.namespace else msgspec.json.encode(ids)
                    fields = RoutingFields(fields.model, packed_ids(ids), spelled)
                exchange = Exchange(proxy, self._scope, way, fields)
                with request_span(proxy.tracing, self._scope, exchange.id) as exchange.span:
                    deadline_s = _now_s() + proxy.limits.timeout_s
                    async with asyncio.timeout_at(deadline_s):
                        taken = await exchange.first_answer()
                    try:
                        async with aclosing(self._outputs(request, taken, deadline_s)) as outputs:
                            async for output in outputs:
                                yield output
                    finally:
                        taken.close()
            finally:
                proxy.gate.leave()
        except TimeoutError:
            told = GatewayTimeout(
                f"the request was not answered within {proxy.limits.timeout_s:g} s; ask for less, "
                "or start the gateway with a larger --request-timeout-secs"
            )
            yield _ended(request, told)
        except UnsupportedFeature:
            raise  # it names the field
        except SapwoodError as error:
            yield _ended(request, error)

    async def _outputs(
        self, request: Generate, taken: Taken[TokenAnswer], deadline_s: float
    ) -> AsyncGenerator[RequestOutput, None]:
        worker, answer, proxy = taken.worker, taken.answer, self._proxy
        started_s = time.perf_counter()
        is_settled = False
        try:
            async with asyncio.timeout_at(deadline_s):
                refusal = await answer.refusal()
            if refusal is not None:
                is_settled = True
                self._settle(taken, started_s, None)
                raise refusal
            answer.watch(proxy.limits.stream_idle_s)
            times = StreamTimes(started_s)
            while not is_settled:
                async with asyncio.timeout_at(deadline_s):
                    outputs, num_events = await answer.next()
                times.add(num_events)
                for output in outputs:
                    if output.finish is not None:
                        is_settled = True
                        self._settle(taken, started_s, times)
                    yield output
        except (WorkerFailure, MalformedAnswer) as error:
            is_settled = True
            if isinstance(error, PeerFailure):
                worker.breaker.ended()
            else:
                worker.breaker.failed(proxy.fleet.clock())
                worker.last_error = str(error)
                proxy.metrics.failed(worker, "broken_stream")
            log.warning("an answer of worker %s broke off: %s", worker.url, error)
            raise BadGateway(f"the worker's answer broke off: {error}; ask again") from error
        finally:
            if not is_settled:
                worker.breaker.ended()

    def _settle(
        self, taken: Taken[TokenAnswer], started_s: float, times: StreamTimes | None
    ) -> None:
        """The answer is there in whole: tell the breaker and the metrics."""
        worker, status = taken.worker, taken.answer.status
        if status in WORKER_AT_FAULT:
            worker.breaker.failed(self._proxy.fleet.clock())
        elif status in RETRYABLE:
            worker.breaker.ended()
        else:
            worker.breaker.succeeded()
        self._proxy.metrics.answered(worker, status, started_s, times)

    def _max_new_tokens(self, request: Generate) -> int | None:
        asked = request.options.sampling.max_new_tokens
        if asked is not None or not self._max_model_len:
            return asked
        # One less than the room: SGLang's engines refuse to fill the context.
        return max(1, self._max_model_len - len(request.prompt_ids) - 1)

    async def abort(self, request_id: str) -> None:
        """Requests end when their outputs are closed."""

    async def flush_cache(self) -> CacheFlushed:
        raise _not_here()

    async def status(self) -> EngineStatus:
        raise _not_here()

    async def start_profile(self, order: StartProfile) -> CallDone:
        raise _not_here()

    async def stop_profile(self) -> CallDone:
        raise _not_here()

    async def record_experts(self, order: RecordExperts) -> CallDone:
        raise _not_here()

    async def freeze_gc(self) -> CallDone:
        raise _not_here()

    async def slow_down(self, sleep_s: float) -> CallDone:
        raise _not_here()

    async def load_adapter(
        self, adapter_id: str, path: str, sent: SentAdapter | None = None
    ) -> CallDone:
        raise _not_here()

    async def unload_adapter(self, adapter_id: str) -> CallDone:
        raise _not_here()

    async def order_weights(self, order: OrderWeights) -> CallDone:
        raise _not_here()

    async def steer_tiers(self, message: SteerTiers) -> CallDone:
        raise _not_here()

    async def pause(self, mode: str) -> CallDone:
        raise _not_here()

    async def resume(self) -> CallDone:
        raise _not_here()


def _ended(request: Generate, error: SapwoodError) -> RequestOutput:
    return RequestOutput(
        request_id=request.request_id,
        token_ids=[],
        num_prompt_tokens=len(request.prompt_ids),
        finish=Finish(
            kind="error", message=error.message, status=error.status, error_type=error.type
        ),
    )


def _not_here() -> EngineUnavailable:
    return EngineUnavailable("the gateway asks its workers only for tokens here")


def _now_s() -> float:
    return asyncio.get_running_loop().time()
