"""GET /v1/loads: how busy the engine is, for routers that choose among several."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import EngineUnavailable, InvalidRequest
from sapwood.frontends.serving.engine_figures import EngineFigures
from sapwood.frontends.serving.services import Services
from sapwood.http.errors import json_response
from sapwood.observe.metrics import CONTENT_TYPE, PREFIX, EngineConstants, memory_by_owner
from sapwood.schema.output import EngineStatus

MAX_AGE_S = 0.2
"""Routers ask often; figures of this age are good enough for an answer."""

SECTIONS = ("core", "memory", "spec", "lora", "disagg", "queues")
FORMATS = ("json", "prometheus")


async def loads(request: Request, services: Services, figures: EngineFigures) -> Response:
    query = request.query_params
    sections = _sections(query.get("include"))
    form = query.get("format", "json")
    if form not in FORMATS:
        raise InvalidRequest(
            f"format is {form!r} but must be one of {', '.join(FORMATS)}", param="format"
        )
    rank = query.get("dp_rank", "0")
    if rank != "0":
        raise InvalidRequest(
            f"dp_rank is {rank!r} but this server has only rank 0", param="dp_rank"
        )
    status, constants = await _read(services, figures)
    load = load_of(status, constants, services, sections)
    if form == "prometheus":
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_LoadGauges(load))
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE})
    return json_response(
        {
            "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "version": services.version,
            "dp_rank_count": 1,
            "loads": [load],
            "aggregate": {
                "total_running_reqs": status.num_running,
                "total_waiting_reqs": status.num_waiting,
                "total_reqs": status.num_running + status.num_waiting,
                "avg_token_usage": status.num_leased_pages / max(status.num_pages, 1),
                "avg_throughput": _throughput(services),
                "avg_utilization": status.num_running / max(constants.max_running_requests, 1),
            },
        }
    )


async def old_loads(services: Services, figures: EngineFigures) -> Response:
    """GET /get_load, the form that older routers read: one entry per rank."""
    status, constants = await _read(services, figures)
    return json_response(
        [
            {
                "dp_rank": 0,
                "num_reqs": status.num_running + status.num_waiting,
                "num_waiting_reqs": status.num_waiting,
                "num_tokens": status.num_leased_pages * constants.page_size,
                "ts_tic": time.time(),
            }
        ]
    )


def load_of(
    status: EngineStatus,
    constants: EngineConstants,
    services: Services,
    sections: frozenset[str],
) -> dict[str, Any]:
    """The chosen sections of a load; the fields of core are on the top level, as in SGLang."""
    load: dict[str, Any] = {"dp_rank": 0}
    if "core" in sections:
        rates = services.observer.metrics.engine.rates
        load |= {
            "num_running_reqs": status.num_running,
            "num_waiting_reqs": status.num_waiting,
            "num_total_reqs": status.num_running + status.num_waiting,
            "num_used_tokens": status.num_leased_pages * constants.page_size,
            "max_total_num_tokens": constants.max_total_tokens,
            "token_usage": status.num_leased_pages / max(status.num_pages, 1),
            "gen_throughput": rates.output_tokens_per_s,
            "cache_hit_rate": rates.cache_hit_rate or 0.0,
            "utilization": status.num_running / max(constants.max_running_requests, 1),
            "max_running_requests": constants.max_running_requests,
        }
    if "memory" in sections:
        sizes = dict(memory_by_owner(status, constants))
        load["memory"] = {
            "weight_gb": sizes["weights"] / 1e9,
            "kv_cache_gb": sum(pool.size * pool.unit_bytes for pool in constants.pools) / 1e9,
            "token_capacity": constants.max_total_tokens,
            "owners": sizes,
            "engine_resident_bytes": status.resident_bytes,
        }
    if "queues" in sections:
        load["queues"] = {"waiting": status.num_waiting, "retracted": status.num_retractions}
    if "spec" in sections:
        spec = status.speculated
        load["speculative"] = spec and {
            "accept_length": spec.accept_length,
            "accept_rate": spec.accept_rate,
        }
    if "lora" in sections:
        lora = status.adapters
        load["lora"] = lora and {
            "slots_used": lora.num_used,
            "slots_total": lora.num_slots,
            "utilization": lora.utilization,
        }
    if "disagg" in sections:
        load["disaggregation"] = None  # prefill and decoding are not apart
    return load


async def _read(services: Services, figures: EngineFigures) -> tuple[EngineStatus, EngineConstants]:
    await figures.refresh(MAX_AGE_S)
    reason = services.engine.unavailable_reason
    constants = services.observer.metrics.engine.constants
    if figures.status is None or constants is None:
        raise EngineUnavailable(f"the engine tells no figures: {reason or 'it is busy'}")
    return figures.status, constants


def _throughput(services: Services) -> float:
    return services.observer.metrics.engine.rates.output_tokens_per_s


def _sections(include: str | None) -> frozenset[str]:
    names = frozenset((include or "all").split(","))
    unknown = sorted(names - {*SECTIONS, "all"})
    if unknown:
        raise InvalidRequest(
            f"include names {unknown[0]!r}; known are {', '.join(SECTIONS)} and all",
            param="include",
        )
    return frozenset(SECTIONS) if "all" in names else names


class _LoadGauges(Collector):
    """The numbers of a load as gauges with the rank as a label."""

    def __init__(self, load: dict[str, Any]) -> None:
        self._load = load

    def collect(self) -> list[Metric]:
        gauges: list[Metric] = []
        for name, value in self._load.items():
            if name == "dp_rank" or not isinstance(value, int | float):
                continue
            gauge = GaugeMetricFamily(f"{PREFIX}load_{name}", "See /v1/loads.", labels=["dp_rank"])
            gauge.add_metric(["0"], value)
            gauges.append(gauge)
        return gauges
