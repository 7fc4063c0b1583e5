"""Orders to an engine while it serves: about its weights, its memory, and whether it generates."""

from __future__ import annotations

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.serving.services import Services
from sapwood.schema.client import EngineClient
from sapwood.schema.output import CallDone
from sapwood.schema.request import OrderWeights
from sapwood.schema.weights import PAUSE_MODES, UpdateFromDisk, WeightOrder

NO_IPC = (
    "update_weights_from_ipc takes handles to another process's GPU memory, which are not read "
    "here; use /update_weights_from_disk, _from_tensor or _from_distributed"
)
NO_SENDING = (
    "a server here sends its weights to no other: the other would have to keep them in the same "
    "layout, since they come without names; start it from the same files or call its "
    "/update_weights_from_disk, or let a trainer's process group have the ranks of both"
)


async def order_weights(
    services: Services,
    order: WeightOrder,
    *,
    flush_cache: bool = True,
    abort_all: bool = False,
    between_steps: bool = False,
    weight_version: str | None = None,
    engine: EngineClient | None = None,
) -> CallDone:
    """Have an order carried out. Path and version of the weights change only if that succeeded.

    engine  one of the replicas; None: all of them"""
    if between_steps and flush_cache:
        raise InvalidRequest(
            "between_steps keeps requests with the KV of the old weights, so it needs flush_cache "
            "false",
            param="between_steps",
        )
    message = OrderWeights(
        call_id="",
        order=order,
        abort_all=abort_all,
        flush_cache=flush_cache,
        between_steps=between_steps,
    )
    done = await (engine or services.engine).order_weights(message)
    if done.done:
        if isinstance(order, UpdateFromDisk):
            services.served.path = order.path
        if weight_version is not None:
            services.served.version = weight_version
    return done


async def pause(services: Services, mode: str) -> CallDone:
    """InvalidRequest for an unknown mode."""
    if mode not in PAUSE_MODES:
        raise InvalidRequest(
            f"mode is {mode[:100]!r} but must be one of {', '.join(PAUSE_MODES)}", param="mode"
        )
    done = await services.engine.pause(mode)
    services.served.is_paused = services.served.is_paused or done.done
    return done


async def go_on(services: Services) -> CallDone:
    done = await services.engine.resume()
    services.served.is_paused = services.served.is_paused and not done.done
    return done
