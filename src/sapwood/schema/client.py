"""The engine as the rooms above the wire see it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from sapwood.schema.output import CacheFlushed, CallDone, EngineReady, EngineStatus, RequestOutput
from sapwood.schema.request import (
    Generate,
    OrderWeights,
    RecordExperts,
    SentAdapter,
    StartProfile,
    SteerTiers,
)


class EngineClient(Protocol):
    """One engine. All methods are called from one event loop."""

    @property
    def info(self) -> EngineReady:
        """What the engine resolved at start; EngineUnavailable before it is ready."""
        ...

    @property
    def unavailable_reason(self) -> str | None:
        """None while the engine serves; else why it does not (starting, draining, died: …)."""
        ...

    def generate(self, request: Generate) -> AsyncIterator[RequestOutput]:
        """Submit and yield outputs up to and including the one with a `finish`.

        Closing the iterator early aborts the request. If the engine dies, the iterator ends with an
        output whose finish is of kind "error"; it never raises for that and never hangs.
        """
        ...

    async def abort(self, request_id: str) -> None: ...

    async def flush_cache(self) -> CacheFlushed: ...

    async def status(self) -> EngineStatus: ...

    async def start_profile(self, order: StartProfile) -> CallDone:
        """Start a profile; the implementation fills in `order.call_id`."""
        ...

    async def stop_profile(self) -> CallDone: ...

    async def record_experts(self, order: RecordExperts) -> CallDone:
        """Start, stop or write a record; the implementation fills in `order.call_id`."""
        ...

    async def freeze_gc(self) -> CallDone: ...

    async def slow_down(self, sleep_s: float) -> CallDone: ...

    async def load_adapter(
        self, adapter_id: str, path: str, sent: SentAdapter | None = None
    ) -> CallDone:
        """Load the LoRA adapter in the folder `path` under a new id."""
        ...

    async def unload_adapter(self, adapter_id: str) -> CallDone: ...

    async def order_weights(self, order: OrderWeights) -> CallDone:
        """Carry out an order about weights; the implementation fills in `order.call_id`."""
        ...

    async def steer_tiers(self, message: SteerTiers) -> CallDone:
        """Carry an order about the storage tier out; the implementation fills in its `call_id`."""
        ...

    async def pause(self, mode: str) -> CallDone: ...

    async def resume(self) -> CallDone:
        """Go on after `pause`."""
        ...
