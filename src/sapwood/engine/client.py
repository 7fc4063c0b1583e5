"""The engine as an asyncio program sees it: requests out, a stream of outputs back for each."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import msgspec

from sapwood.base.channel import Sender
from sapwood.base.errors import EngineUnavailable
from sapwood.schema.output import (
    CacheFlushed,
    CallDone,
    EngineFatal,
    EngineOutput,
    EngineReady,
    EngineStatus,
    Finish,
    RequestOutput,
    StepOutputs,
    summed,
)
from sapwood.schema.request import (
    Abort,
    Continue,
    Drain,
    EngineInput,
    FlushCache,
    FreezeGc,
    Generate,
    GetStatus,
    LoadAdapter,
    OrderWeights,
    Pause,
    RecordExperts,
    SentAdapter,
    SlowDown,
    StartProfile,
    SteerTiers,
    StopProfile,
    UnloadAdapter,
)

A = TypeVar("A")


class AsyncEngineClient:
    """Implements `schema.client.EngineClient` over any channel. Lives on one event loop.

    The transport calls `deliver` with each message of the engine and `fail` when the engine is
    gone, both on that loop.
    """

    def __init__(self, sender: Sender[EngineInput]) -> None:
        self._sender = sender
        self._info: EngineReady | None = None
        self._reason: str | None = "the engine is starting"
        self._failed = False
        self.is_draining = False
        self._started = asyncio.Event()
        self._ended = asyncio.Event()
        self._streams: dict[str, asyncio.Queue[RequestOutput]] = {}
        # Ids whose reader left, with the number of terminal outputs that will still come for them.
        # These outputs must not reach a newer request with the same id.
        self._left: Counter[str] = Counter()
        self._calls: dict[str, asyncio.Future[Any]] = {}
        self._num_calls = 0
        self._handlers: dict[type, Callable[..., None]] = {
            StepOutputs: self._on_outputs,
            EngineReady: self._on_ready,
            EngineFatal: lambda message: self.fail(message.reason),
            CacheFlushed: self._on_answer,
            CallDone: self._on_answer,
            EngineStatus: self._on_answer,
        }

    # ---- what callers use --------------------------------------------------------------------

    @property
    def info(self) -> EngineReady:
        if self._info is None:
            raise EngineUnavailable(self._reason or "the engine is starting")
        return self._info

    @property
    def is_ready(self) -> bool:
        """Whether the engine has reported that it is ready; it may have begun to drain since."""
        return self._started.is_set() and not self._failed

    @property
    def unavailable_reason(self) -> str | None:
        return self._reason

    async def generate(self, request: Generate) -> AsyncIterator[RequestOutput]:
        if self._reason is not None:
            yield self._unavailable(request.request_id)
            return
        # First, since a request that cannot be sent must not keep its id, nor be aborted later.
        self._sender.send(request)
        stream = self._streams[request.request_id] = asyncio.Queue[RequestOutput]()
        ended = False
        try:
            while not ended:
                output = _merged(await stream.get(), stream)
                ended = output.finish is not None
                yield output
        finally:
            del self._streams[request.request_id]
            if not ended and not _has_finish(stream) and not self._failed:
                self._left[request.request_id] += 1
                self._sender.send(Abort(request.request_id))

    async def abort(self, request_id: str) -> None:
        if not self._failed:
            self._sender.send(Abort(request_id))

    async def flush_cache(self) -> CacheFlushed:
        return await self._call(lambda call_id: FlushCache(call_id), CacheFlushed)

    async def status(self) -> EngineStatus:
        return await self._call(lambda call_id: GetStatus(call_id), EngineStatus)

    async def start_profile(self, order: StartProfile) -> CallDone:
        return await self._call(
            lambda call_id: msgspec.structs.replace(order, call_id=call_id), CallDone
        )

    async def stop_profile(self) -> CallDone:
        return await self._call(lambda call_id: StopProfile(call_id), CallDone)

    async def record_experts(self, order: RecordExperts) -> CallDone:
        return await self._call(
            lambda call_id: msgspec.structs.replace(order, call_id=call_id), CallDone
        )

    async def freeze_gc(self) -> CallDone:
        return await self._call(lambda call_id: FreezeGc(call_id), CallDone)

    async def slow_down(self, sleep_s: float) -> CallDone:
        return await self._call(lambda call_id: SlowDown(call_id, sleep_s), CallDone)

    async def load_adapter(
        self, adapter_id: str, path: str, sent: SentAdapter | None = None
    ) -> CallDone:
        return await self._call(
            lambda call_id: LoadAdapter(
                call_id=call_id, adapter_id=adapter_id, path=path, sent=sent
            ),
            CallDone,
        )

    async def unload_adapter(self, adapter_id: str) -> CallDone:
        return await self._call(lambda call_id: UnloadAdapter(call_id, adapter_id), CallDone)

    async def order_weights(self, order: OrderWeights) -> CallDone:
        return await self._call(
            lambda call_id: msgspec.structs.replace(order, call_id=call_id), CallDone
        )

    async def steer_tiers(self, message: SteerTiers) -> CallDone:
        return await self._call(
            lambda call_id: msgspec.structs.replace(message, call_id=call_id), CallDone
        )

    async def pause(self, mode: str) -> CallDone:
        return await self._call(lambda call_id: Pause(call_id, mode), CallDone)

    async def resume(self) -> CallDone:
        return await self._call(lambda call_id: Continue(call_id), CallDone)

    async def wait_for_change(self) -> None:
        """Wait until the engine is ready or has failed."""
        await self._started.wait()

    async def wait_until_failed(self) -> None:
        await self._ended.wait()

    def drain(self, timeout_s: float) -> None:
        """No new requests; the engine ends after the open ones, or after `timeout_s`."""
        if not self._failed:
            self.is_draining = True
            self._reason = "the server is shutting down"
            self._sender.send(Drain(timeout_s))

    def restart(self, sender: Sender[EngineInput], reason: str) -> None:
        """Another engine starts in the place of the failed one.

        sender  sends to the new engine
        reason  why requests are refused until the new engine is ready
        """
        if not self._failed:
            raise RuntimeError("the engine has not failed")
        self._sender = sender
        self._failed = False
        self._reason = reason
        self._started.clear()
        self._ended.clear()

    # ---- what the transport calls ------------------------------------------------------------

    def deliver(self, message: EngineOutput) -> None:
        self._handlers[type(message)](message)

    def fail(self, reason: str) -> None:
        """The engine is gone: open requests get their terminal error; the first reason stays."""
        if self._failed:
            return
        self._failed = True
        self._reason = reason
        self._started.set()
        self._ended.set()
        self._left.clear()
        for request_id, stream in self._streams.items():
            stream.put_nowait(self._unavailable(request_id))
        for call in self._calls.values():
            if not call.done():
                call.set_exception(EngineUnavailable(reason))

    @property
    def failure(self) -> str | None:
        return self._reason if self._failed else None

    # ---- inside ------------------------------------------------------------------------------

    async def _call(self, message: Callable[[str], EngineInput], answer: type[A]) -> A:
        # A draining engine may have ended already, and then nobody would answer.
        if self._reason is not None:
            raise EngineUnavailable(self._reason)
        self._num_calls += 1
        call_id = str(self._num_calls)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            self._sender.send(message(call_id))
            result = await future
        finally:
            del self._calls[call_id]
        assert isinstance(result, answer)
        return result

    def _on_outputs(self, message: StepOutputs) -> None:
        for output in message.outputs:
            if self._left and self._is_for_reader_that_left(output):
                continue
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put_nowait(output)

    def _is_for_reader_that_left(self, output: RequestOutput) -> bool:
        """Whether an output belongs to an older request with the same id, whose reader has left.

        The engine works in the order of its messages: the older request's outputs come first, and
        exactly one of them is terminal.
        """
        if output.request_id not in self._left:
            return False
        if output.finish is not None:
            self._left[output.request_id] -= 1
            if self._left[output.request_id] == 0:
                del self._left[output.request_id]
        return True

    def _on_ready(self, message: EngineReady) -> None:
        self._info = message
        self._started.set()
        if self.is_draining:
            # The earlier order may be lost: it was sent before the engine had connected.
            self._sender.send(Drain(0.0))
        else:
            self._reason = None

    def _on_answer(self, message: CacheFlushed | CallDone | EngineStatus) -> None:
        future = self._calls.get(message.call_id)
        if future is not None and not future.done():
            future.set_result(message)

    def _unavailable(self, request_id: str) -> RequestOutput:
        return failed_output(
            request_id, self._reason or "the engine is gone", 503, "ServiceUnavailableError"
        )


def _merged(output: RequestOutput, stream: asyncio.Queue[RequestOutput]) -> RequestOutput:
    """One output in the place of all waiting ones: a slow reader gets fewer, longer outputs."""
    outputs = [output]
    while outputs[-1].finish is None and not stream.empty():
        outputs.append(stream.get_nowait())
    return summed(outputs)


def _has_finish(stream: asyncio.Queue[RequestOutput]) -> bool:
    """Whether the terminal output is in the queue of a reader that has left."""
    has_finish = False
    while not stream.empty():
        has_finish = stream.get_nowait().finish is not None
    return has_finish


def failed_output(request_id: str, message: str, status: int, error_type: str) -> RequestOutput:
    """The terminal output of a request that an engine did not take, or lost."""
    finish = Finish(kind="error", message=message, status=status, error_type=error_type)
    return RequestOutput(request_id=request_id, token_ids=[], num_prompt_tokens=0, finish=finish)
