"""GET /dashboard/figures: the data of the live page."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import msgspec
import psutil
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.serving.engine_figures import EngineFigures
from sapwood.frontends.serving.services import Services
from sapwood.http.errors import json_response
from sapwood.observe.history import PERCENTILES
from sapwood.observe.metrics import memory_by_owner, units_by_owner


async def figures_json(request: Request, services: Services, figures: EngineFigures) -> Response:
    """Samples from the number `since` on, and the present state, without asking the engine."""
    since = request.query_params.get("since", "0")
    if not since.isdecimal() or len(since) > 15:
        raise InvalidRequest(f"since is {since!r} but must be a number >= 0", param="since")
    history = figures.history
    return json_response(
        {
            "model": services.model_name,
            "version": services.version,
            "uptime_s": max(0.0, time.time() - services.created),
            "state": services.engine.unavailable_reason or "ready",
            "percentiles": PERCENTILES,
            "next": history.num_added,
            "samples": [dataclasses.asdict(sample) for sample in history.since(int(since))],
            "requests": dataclasses.asdict(services.observer.metrics.totals()),
            **_memory(figures),
        }
    )


def _memory(figures: EngineFigures) -> dict[str, Any]:
    resident = {"api": psutil.Process().memory_info().rss}
    cpu = {"api": time.process_time()}
    status, constants = figures.status, figures.constants
    if status is None or constants is None:
        return {
            "memory": {},
            "pools": [],
            "tiers": None,
            "resident_bytes": resident,
            "cpu_seconds": cpu,
            "kv": None,
        }
    return {
        "memory": dict(memory_by_owner(status, constants)),
        "pools": [
            {"name": pool.name}
            | {owner: number * pool.unit_bytes for owner, number in units_by_owner(pool, use)}
            for pool, use in zip(constants.pools, status.pools, strict=True)
        ],
        "tiers": None if status.tiers is None else msgspec.to_builtins(status.tiers),
        "resident_bytes": resident | {"engine": status.resident_bytes},
        "cpu_seconds": cpu | {"engine": status.cpu_seconds},
        "kv": {
            "used_tokens": status.num_leased_pages * constants.page_size,
            "free_tokens": status.num_free_pages * constants.page_size,
            "max_tokens": constants.max_total_tokens,
        },
    }
