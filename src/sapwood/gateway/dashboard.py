"""/dashboard: a live page of the workers, and its figures."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sapwood.gateway.fleet import Fleet
from sapwood.gateway.gate import Gate
from sapwood.gateway.metrics import GatewayMetrics
from sapwood.gateway.steering import described
from sapwood.gateway.worker import WorkerState
from sapwood.http.endpoints import Dialect, Endpoint
from sapwood.http.errors import json_response
from sapwood.http.files import files_dialect

_ADDRESSES: Mapping[str, str] = MappingProxyType(
    {"dashboard.html": "/dashboard", "favicon.svg": "/favicon.svg"}
)


def dashboard_dialect(fleet: Fleet, gate: Gate, metrics: GatewayMetrics) -> Dialect:
    dialect = files_dialect("dashboard", "sapwood.gateway", _ADDRESSES)
    started_s = time.monotonic()

    # Addresses and errors of workers are for those who steer.
    @dialect.serves(
        Endpoint(
            paths=("/dashboard/figures",), methods=("GET",), access="admin", is_documented=False
        )
    )
    async def figures(request: Request) -> Response:
        return json_response(
            {
                "uptime_s": time.monotonic() - started_s,
                **_present(fleet, gate),
                **_totals(fleet, metrics),
                "workers": [
                    {**described(worker, fleet), "num_failures": metrics.num_failures(worker)}
                    for worker in fleet
                ],
            }
        )

    return dialect


def _present(fleet: Fleet, gate: Gate) -> dict[str, Any]:
    num_ready = sum(worker.state is WorkerState.READY for worker in fleet)
    return {
        "state": "ready" if fleet.is_ready else fleet.readiness,
        "num_ready": num_ready,
        "num_open": gate.num_open,
        "num_waiting": gate.num_waiting,
    }


def _totals(fleet: Fleet, metrics: GatewayMetrics) -> dict[str, Any]:
    """known_bytes is None if the policy does not look at prefixes."""
    prefixes = fleet.prefixes
    return {
        "policy": ", ".join(dict.fromkeys(metrics.policies.values())),
        "num_answers": metrics.num_answers,
        "num_retries": metrics.num_retries,
        "num_left": metrics.num_left,
        "prompt_bytes": 0 if prefixes is None else prefixes.num_bytes,
        "known_bytes": None if prefixes is None else prefixes.num_known_bytes,
    }
