"""What steers an engine while it serves: its weights, its memory, and whether it generates."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.base.errors import InvalidRequest
from sapwood.schema.client import EngineClient
from sapwood.schema.output import CallDone
from sapwood.schema.request import OrderWeights
from sapwood.schema.weights import PAUSE_MODES, UpdateFromDisk, WeightOrder

INITIAL_VERSION = "default"
"""The name of the weights that a server starts with, unless --weight-version says another."""


@dataclass(slots=True)
class EngineControl:
    """Steers one engine, or all replicas.

    weight_version  the name of the weights that are served
    model_path      where they were read from last
    is_paused       whether generation is paused
    """

    engine: EngineClient
    model_path: str
    weight_version: str = INITIAL_VERSION
    is_paused: bool = False

    async def order(
        self,
        order: WeightOrder,
        *,
        flush_cache: bool = True,
        abort_all: bool = False,
        weight_version: str | None = None,
    ) -> CallDone:
        """Have an order carried out. The version is the new one only if that succeeded."""
        done = await self.engine.order_weights(
            OrderWeights(call_id="", order=order, abort_all=abort_all, flush_cache=flush_cache)
        )
        if done.done:
            if isinstance(order, UpdateFromDisk):
                self.model_path = order.path
            if weight_version is not None:
                self.weight_version = weight_version
        return done

    async def pause(self, mode: str) -> CallDone:
        if mode not in PAUSE_MODES:
            raise InvalidRequest(
                f"mode is {mode[:100]!r} but must be one of {', '.join(PAUSE_MODES)}", param="mode"
            )
        done = await self.engine.pause(mode)
        self.is_paused = self.is_paused or done.done
        return done

    async def go_on(self) -> CallDone:
        done = await self.engine.resume()
        self.is_paused = self.is_paused and not done.done
        return done
