"""GET /v1/loads: how busy each replica is, for routers that choose among several servers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import EngineUnavailable, InvalidRequest
from sapwood.frontends.serving.engine_figures import EngineFigures, ReplicaFigures
from sapwood.frontends.serving.services import Services
from sapwood.http.errors import json_response
from sapwood.observe.metrics import CONTENT_TYPE, PREFIX, memory_by_owner
from sapwood.schema.output import HandoverCounts

MAX_AGE_S = 0.2
"""Routers ask often; figures of this age are good enough for an answer."""

SECTIONS = ("core", "memory", "spec", "lora", "disagg", "queues")
FORMATS = ("json", "prometheus")


async def loads(request: Request, services: Services, figures: EngineFigures) -> Response:
    query = request.query_params
    form = query.get("format", "json")
    if form not in FORMATS:
        raise InvalidRequest(
            f"format is {form!r} but must be one of {', '.join(FORMATS)}", param="format"
        )
    include = query.get("include", "").split(",")
    told = await all_loads(services, figures, include, query.get("dp_rank"))
    if form == "prometheus":
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_LoadGauges(told["loads"]))
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE})
    return json_response(told)


async def all_loads(
    services: Services, figures: EngineFigures, include: Sequence[str], rank: str | None
) -> dict[str, Any]:
    """The loads of all replicas, or of the one of that rank, and what they come to.

    include  names of SECTIONS; none, or "all": all
    Raises   InvalidRequest, or EngineUnavailable if no engine tells its figures
    """
    sections = _sections(include)
    replicas = [_Replica(one) for one in _chosen(rank, await _read(services, figures))]
    running = sum(replica.status.num_running for replica in replicas)
    waiting = sum(replica.status.num_waiting for replica in replicas)
    return {
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "version": services.version,
        "dp_rank_count": len(figures.replicas),
        "loads": [replica.load(sections) for replica in replicas],
        "aggregate": {
            "total_running_reqs": running,
            "total_waiting_reqs": waiting,
            "total_reqs": running + waiting,
            "avg_token_usage": _mean(replica.token_usage for replica in replicas),
            "avg_throughput": _mean(replica.throughput for replica in replicas),
            "avg_utilization": _mean(replica.utilization for replica in replicas),
        },
    }


async def old_loads(services: Services, figures: EngineFigures) -> Response:
    """GET /get_load, the form that older routers read: one entry per rank."""
    replicas = [_Replica(one) for one in await _read(services, figures)]
    return json_response(
        [
            {
                "dp_rank": replica.rank,
                "num_reqs": replica.status.num_running + replica.status.num_waiting,
                "num_waiting_reqs": replica.status.num_waiting,
                "num_tokens": replica.num_used_tokens,
                "ts_tic": time.time(),
            }
            for replica in replicas
        ]
    )


class _Replica:
    """A replica's latest figures."""

    def __init__(self, figures: ReplicaFigures) -> None:
        status, constants = figures.status, figures.state.constants
        assert status is not None
        assert constants is not None
        self.rank = figures.rank
        self.status = status
        self.constants = constants
        self.rates = figures.state.rates
        self.num_used_tokens = status.num_leased_pages * constants.page_size
        self.token_usage = status.num_leased_pages / max(status.num_pages, 1)
        self.throughput = self.rates.output_tokens_per_s
        self.utilization = status.num_running / max(constants.max_running_requests, 1)

    def load(self, sections: frozenset[str]) -> dict[str, Any]:
        """The chosen sections; the fields of core are on the top level, as in SGLang."""
        status, constants = self.status, self.constants
        load: dict[str, Any] = {"dp_rank": self.rank}
        if "core" in sections:
            load |= {
                "num_running_reqs": status.num_running,
                "num_waiting_reqs": status.num_waiting,
                "num_total_reqs": status.num_running + status.num_waiting,
                "num_used_tokens": self.num_used_tokens,
                "max_total_num_tokens": constants.max_total_tokens,
                "token_usage": self.token_usage,
                "gen_throughput": self.throughput,
                "cache_hit_rate": self.rates.cache_hit_rate or 0.0,
                "utilization": self.utilization,
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
            load["disaggregation"] = _disaggregation(status.handovers)
        return load


def _disaggregation(counts: HandoverCounts | None) -> dict[str, Any] | None:
    """None: the engine reads and answers its prompts itself."""
    if counts is None:
        return None
    queue = "prefill_inflight" if counts.part == "prefill" else "decode_transfer"
    return {
        "mode": counts.part,
        f"{queue}_queue_reqs": counts.num_under_way,
        "num_transferred_reqs": counts.num_done,
        "num_transfer_failed_reqs": counts.num_failed,
    }


async def _read(services: Services, figures: EngineFigures) -> list[ReplicaFigures]:
    """The replicas that serve and have answered; EngineUnavailable if there are none."""
    await figures.refresh(MAX_AGE_S)
    told = [one for one in figures.replicas if one.status is not None]
    serving = [one for one in told if one.unavailable_reason is None] or told
    if not serving:
        reason = services.engine.unavailable_reason
        raise EngineUnavailable(f"the engine tells no figures: {reason or 'it is busy'}")
    return serving


def _chosen(rank: str | None, replicas: list[ReplicaFigures]) -> list[ReplicaFigures]:
    """All replicas, or the one of that rank."""
    if rank is None:
        return replicas
    found = [one for one in replicas if str(one.rank) == rank]
    if not found:
        ranks = ", ".join(str(one.rank) for one in replicas)
        raise InvalidRequest(
            f"dp_rank is {rank!r} but must be among the ranks that serve: {ranks}",
            param="dp_rank",
        )
    return found


def _mean(values: Iterable[float]) -> float:
    """Of at least one value."""
    many = list(values)
    return sum(many) / len(many)


def _sections(include: Sequence[str]) -> frozenset[str]:
    names = frozenset(filter(None, include)) or {"all"}
    unknown = sorted(names - {*SECTIONS, "all"})
    if unknown:
        raise InvalidRequest(
            f"include names {unknown[0]!r}; known are {', '.join(SECTIONS)} and all",
            param="include",
        )
    return frozenset(SECTIONS) if "all" in names else frozenset(names)


class _LoadGauges(Collector):
    """The numbers of loads as gauges with the rank as a label."""

    def __init__(self, loads: list[dict[str, Any]]) -> None:
        self._loads = loads

    def collect(self) -> list[Metric]:
        gauges: dict[str, GaugeMetricFamily] = {}
        for load in self._loads:
            for name, value in load.items():
                if name == "dp_rank" or not isinstance(value, int | float):
                    continue
                if name not in gauges:
                    gauges[name] = GaugeMetricFamily(
                        f"{PREFIX}load_{name}", "See /v1/loads.", labels=["dp_rank"]
                    )
                gauges[name].add_metric([str(load["dp_rank"])], value)
        return list(gauges.values())
