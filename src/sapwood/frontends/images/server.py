"""The ASGI application of a server that draws."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from sapwood.frontends.images.loras import loras_dialect
from sapwood.frontends.images.routes import images_dialect, painting_server_dialect
from sapwood.frontends.images.services import PaintingServices
from sapwood.frontends.videos.jobs import VideoJobs
from sapwood.frontends.videos.records import VideoStore
from sapwood.frontends.videos.routes import videos_dialect
from sapwood.frontends.web.routes import painting_web_dialect
from sapwood.http.access import Access, Guarded
from sapwood.http.body import BodyLimits
from sapwood.http.endpoints import Dialect, Endpoint, EndpointTable
from sapwood.http.errors import json_response
from sapwood.http.failures import answer_errors
from sapwood.http.openapi import openapi_document


def create_painting_app(
    services: PaintingServices,
    videos: VideoStore,
    *,
    access: Access | None = None,
    body_limits: BodyLimits | None = None,
) -> FastAPI:
    """An ASGI application; run it with one worker.

    access  who may use the server; None: everybody who reaches it, but no page of another origin
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    endpoints = EndpointTable(
        [
            images_dialect(services),
            videos_dialect(services, VideoJobs(services, videos)),
            loras_dialect(services),
            painting_server_dialect(services),
            painting_web_dialect(),
            _documents(app, services),
        ]
    )
    endpoints.mount(app)
    endpoints.check_routes(app.routes)
    app.state.body_limits = body_limits or BodyLimits()
    answer_errors(app, endpoints)
    app.add_middleware(Guarded, access=access or Access(), endpoints=endpoints)
    return app


def _documents(app: FastAPI, services: PaintingServices) -> Dialect:
    dialect = Dialect("documents")

    @dialect.serves(
        Endpoint(paths=("/openapi.json",), methods=("GET",), access="user", is_documented=False)
    )
    async def get_document(request: Request) -> Response:
        document = openapi_document(app.state.endpoints, title="sapwood", version=services.version)
        return json_response(document)

    return dialect
