"""The engine that draws as an asyncio program sees it: requests out, events of each one back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal

from sapwood.base.channel import Sender
from sapwood.base.errors import EngineUnavailable
from sapwood.schema.painting import (
    ChangeLoras,
    DrainPainter,
    GetPainterStatus,
    ListLoras,
    LorasAnswer,
    LoraWish,
    Paint,
    PaintDone,
    PainterFatal,
    PainterInput,
    PainterOutput,
    PainterReady,
    PainterStatus,
    PaintEvent,
    PaintFailed,
    PaintProgress,
    StopPainting,
)


class AsyncPaintingClient:
    """Lives on one event loop. The transport calls `deliver` with each message of the engine and
    `fail` when the engine is gone, both on that loop. Request ids must be new ones."""

    def __init__(self, sender: Sender[PainterInput]) -> None:
        self._sender = sender
        self._info: PainterReady | None = None
        self._reason: str | None = "the engine is starting"
        self._failed = False
        self.is_draining = False
        self._started = asyncio.Event()
        self._ended = asyncio.Event()
        self._streams: dict[str, asyncio.Queue[PaintEvent]] = {}
        self._calls: dict[str, asyncio.Future[Any]] = {}
        self._num_calls = 0

    @property
    def info(self) -> PainterReady:
        if self._info is None:
            raise EngineUnavailable(self._reason or "the engine is starting")
        return self._info

    @property
    def is_ready(self) -> bool:
        return self._started.is_set() and not self._failed

    @property
    def unavailable_reason(self) -> str | None:
        return self._reason

    @property
    def failure(self) -> str | None:
        """Why the engine has failed; None: it has not."""
        return self._reason if self._failed else None

    async def paint(self, request: Paint) -> AsyncIterator[PaintEvent]:
        """The picture's events; exactly one, the last, is PaintDone or PaintFailed. Who stops
        reading gives the picture up."""
        if self._reason is not None:
            yield self._unavailable(request.request_id)
            return
        self._sender.send(request)
        stream = self._streams[request.request_id] = asyncio.Queue()
        has_ended = False
        try:
            while not has_ended:
                event = await stream.get()
                has_ended = not isinstance(event, PaintProgress)
                yield event
        finally:
            del self._streams[request.request_id]
            if not has_ended and not self._failed:
                self._sender.send(StopPainting(request.request_id))

    async def status(self) -> PainterStatus:
        found: PainterStatus = await self._call(GetPainterStatus)
        return found

    async def change_loras(
        self,
        kind: Literal["set", "merge", "unmerge"],
        *,
        wishes: Sequence[LoraWish] = (),
        target: str = "all",
        strength: float | None = None,
    ) -> LorasAnswer:
        """Waits until all pictures that were asked for before are done."""
        found: LorasAnswer = await self._call(
            lambda call_id: ChangeLoras(
                call_id=call_id, kind=kind, wishes=tuple(wishes), target=target, strength=strength
            )
        )
        return found

    async def list_loras(self) -> LorasAnswer:
        found: LorasAnswer = await self._call(ListLoras)
        return found

    async def _call(self, message: Callable[[str], PainterInput]) -> Any:
        """The engine's answer to a message with this call's id."""
        if self._reason is not None and not self.is_draining:
            raise EngineUnavailable(self._reason)
        self._num_calls += 1
        call_id = str(self._num_calls)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = answer
        try:
            self._sender.send(message(call_id))
            return await answer
        finally:
            del self._calls[call_id]

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
            self._sender.send(DrainPainter(timeout_s))

    def restart(self, sender: Sender[PainterInput], reason: str) -> None:
        """Another engine starts in the place of the failed one."""
        self._sender = sender
        self._info, self._reason, self._failed = None, reason, False
        self._started, self._ended = asyncio.Event(), asyncio.Event()

    # ---- what the transport calls ------------------------------------------------------------

    def deliver(self, message: PainterOutput) -> None:
        match message:
            case PainterReady():
                self._info = message
                if self.is_draining:
                    # The earlier order may be lost: it was sent before the engine had connected.
                    self._sender.send(DrainPainter(0.0))
                else:
                    self._reason = None
                self._started.set()
            case PainterFatal():
                self.fail(message.reason)
            case PainterStatus() | LorasAnswer():
                call = self._calls.get(message.call_id)
                if call is not None and not call.done():
                    call.set_result(message)
            case PaintProgress() | PaintDone() | PaintFailed():
                stream = self._streams.get(message.request_id)
                if stream is not None:
                    stream.put_nowait(message)

    def fail(self, reason: str) -> None:
        """The engine is gone: all open pictures and calls end. Only the first reason counts."""
        if self._failed:
            return
        self._failed, self._reason = True, reason
        for request_id, stream in self._streams.items():
            stream.put_nowait(self._unavailable(request_id))
        for call in self._calls.values():
            if not call.done():
                call.set_exception(EngineUnavailable(reason))
        self._started.set()
        self._ended.set()

    def _unavailable(self, request_id: str) -> PaintFailed:
        return PaintFailed(
            request_id=request_id,
            kind="failed",
            message=self._reason or "the engine is gone",
            status=503,
            error_type="ServiceUnavailableError",
        )
