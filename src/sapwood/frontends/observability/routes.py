"""Where the server's figures and their controls are mounted."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from sapwood.base.errors import NotFound
from sapwood.frontends.common.openapi import json_body
from sapwood.frontends.common.services import Services
from sapwood.frontends.observability import controls, dashboard
from sapwood.frontends.observability.controls import (
    LoggingRequest,
    ProfileRequest,
    SlowDownRequest,
)
from sapwood.frontends.observability.engine_figures import EngineFigures
from sapwood.frontends.observability.loads import loads, old_loads
from sapwood.observe.metrics import CONTENT_TYPE

OBSERVABILITY_BODIES = (ProfileRequest, LoggingRequest, SlowDownRequest)

SCRAPE_MAX_AGE_S = 1.0


def observability_router(services: Services) -> APIRouter:
    router = APIRouter(tags=["observability"])
    figures = services.figures or EngineFigures(services.engine, services.observer)

    @router.get("/metrics")
    async def get_metrics() -> Response:
        """Prometheus metrics in the text format."""
        if not services.serves_metrics:
            raise NotFound("/metrics is off; start the server with --enable-metrics")
        await figures.refresh(SCRAPE_MAX_AGE_S)
        content = services.observer.metrics.exposition()
        return Response(content, headers={"Content-Type": CONTENT_TYPE})

    @router.get("/v1/loads")
    async def get_loads(request: Request) -> Response:
        return await loads(request, services, figures)

    @router.get("/get_load", deprecated=True)
    async def get_old_loads() -> Response:
        return await old_loads(services, figures)

    @router.get("/dashboard/figures")
    async def get_figures(request: Request) -> Response:
        return await dashboard.figures_json(request, services, figures)

    @router.get("/start_profile")
    @router.post("/start_profile", openapi_extra=json_body(ProfileRequest, required=False))
    async def start_profile(request: Request) -> Response:
        return await controls.start_profile(request, services)

    @router.get("/stop_profile")
    @router.post("/stop_profile")
    async def stop_profile() -> Response:
        return await controls.stop_profile(services)

    @router.get("/freeze_gc")
    @router.post("/freeze_gc")
    async def freeze_gc() -> Response:
        return await controls.freeze_gc(services)

    @router.post("/slow_down", openapi_extra=json_body(SlowDownRequest))
    async def slow_down(request: Request) -> Response:
        return await controls.slow_down(request, services)

    @router.post("/configure_logging", openapi_extra=json_body(LoggingRequest))
    async def configure_logging(request: Request) -> Response:
        return await controls.configure_logging(request, services)

    return router
