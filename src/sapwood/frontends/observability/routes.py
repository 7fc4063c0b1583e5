"""The server's figures and their controls as a table of endpoints."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request, Response

from sapwood.base.errors import NotFound
from sapwood.frontends.native.answer_shapes import Done
from sapwood.frontends.observability import controls, dashboard
from sapwood.frontends.observability.answer_shapes import Figures, Load, Loads, Logging
from sapwood.frontends.observability.controls import (
    LoggingRequest,
    ProfileRequest,
    SlowDownRequest,
)
from sapwood.frontends.observability.loads import loads, old_loads
from sapwood.frontends.serving.engine_figures import EngineFigures
from sapwood.frontends.serving.services import Services
from sapwood.http.endpoints import Dialect, Endpoint, EndpointRows
from sapwood.observe.metrics import CONTENT_TYPE

SCRAPE_MAX_AGE_S = 1.0


@dataclass(frozen=True, slots=True)
class Observed:
    """What the endpoints tell of."""

    services: Services
    figures: EngineFigures


ROWS: EndpointRows[Observed] = EndpointRows()


def observability_dialect(services: Services) -> Dialect:
    figures = services.figures or EngineFigures(
        services.replicas or (services.engine,), services.observer
    )
    return ROWS.dialect("observability", Observed(services, figures))


# Scrapers bring no keys.
@ROWS.serves(
    Endpoint(paths=("/metrics",), methods=("GET",), access="open", answers=(CONTENT_TYPE,))
)
async def get_metrics(request: Request, observed: Observed) -> Response:
    """Prometheus metrics in the text format."""
    if not observed.services.serves_metrics:
        raise NotFound("/metrics is off; start the server with --enable-metrics")
    await observed.figures.refresh(SCRAPE_MAX_AGE_S)
    content = observed.services.observer.metrics.exposition()
    return Response(content, headers={"Content-Type": CONTENT_TYPE})


@ROWS.serves(
    Endpoint(paths=("/v1/loads",), methods=("GET",), access="user", answers=(Loads, CONTENT_TYPE))
)
async def get_loads(request: Request, observed: Observed) -> Response:
    return await loads(request, observed.services, observed.figures)


@ROWS.serves(
    Endpoint(
        paths=("/get_load",),
        methods=("GET",),
        access="user",
        answers=(list[Load],),
        is_deprecated=True,
    )
)
async def get_old_loads(request: Request, observed: Observed) -> Response:
    return await old_loads(observed.services, observed.figures)


@ROWS.serves(
    Endpoint(paths=("/dashboard/figures",), methods=("GET",), access="user", answers=(Figures,))
)
async def get_figures(request: Request, observed: Observed) -> Response:
    return await dashboard.figures_json(request, observed.services, observed.figures)


@ROWS.serves(
    Endpoint(
        paths=("/start_profile",),
        methods=("GET", "POST"),
        access="admin",
        body=ProfileRequest,
        is_body_required=False,
        example={"num_steps": 10},
        answers=(Done,),
    )
)
async def start_profile(request: Request, observed: Observed) -> Response:
    return await controls.start_profile(request, observed.services)


@ROWS.serves(
    Endpoint(paths=("/stop_profile",), methods=("GET", "POST"), access="admin", answers=(Done,))
)
async def stop_profile(request: Request, observed: Observed) -> Response:
    return await controls.stop_profile(observed.services)


@ROWS.serves(
    Endpoint(
        paths=("/start_expert_distribution_record",),
        methods=("GET", "POST"),
        access="admin",
        answers=(Done,),
    )
)
async def start_expert_record(request: Request, observed: Observed) -> Response:
    return await controls.record_experts(observed.services, "start")


@ROWS.serves(
    Endpoint(
        paths=("/stop_expert_distribution_record",),
        methods=("GET", "POST"),
        access="admin",
        answers=(Done,),
    )
)
async def stop_expert_record(request: Request, observed: Observed) -> Response:
    return await controls.record_experts(observed.services, "stop")


@ROWS.serves(
    Endpoint(
        paths=("/dump_expert_distribution_record",),
        methods=("GET", "POST"),
        access="admin",
        answers=(Done,),
    )
)
async def dump_expert_record(request: Request, observed: Observed) -> Response:
    return await controls.record_experts(observed.services, "dump")


@ROWS.serves(
    Endpoint(paths=("/freeze_gc",), methods=("GET", "POST"), access="admin", answers=(Done,))
)
async def freeze_gc(request: Request, observed: Observed) -> Response:
    return await controls.freeze_gc(observed.services)


@ROWS.serves(
    Endpoint(
        paths=("/slow_down",),
        methods=("POST",),
        access="admin",
        body=SlowDownRequest,
        example={"forward_sleep_time": 0.0},
        answers=(Done,),
    )
)
async def slow_down(request: Request, observed: Observed) -> Response:
    return await controls.slow_down(request, observed.services)


@ROWS.serves(
    Endpoint(
        paths=("/configure_logging",),
        methods=("POST",),
        access="admin",
        body=LoggingRequest,
        example={"log_requests": True, "log_requests_level": 1},
        answers=(Logging,),
    )
)
async def configure_logging(request: Request, observed: Observed) -> Response:
    return await controls.configure_logging(request, observed.services)
