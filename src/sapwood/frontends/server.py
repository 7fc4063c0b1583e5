"""The ASGI application: all dialects over one set of services."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from sapwood.frontends.anthropic.routes import anthropic_dialect
from sapwood.frontends.audio.routes import audio_dialect
from sapwood.frontends.batches.routes import batches_dialect
from sapwood.frontends.batches.store import BatchStore
from sapwood.frontends.hosts.routes import hosts_dialect
from sapwood.frontends.native.pooling_routes import pooling_dialect
from sapwood.frontends.native.routes import native_dialect
from sapwood.frontends.native.sessions import session_dialect
from sapwood.frontends.native.tier_routes import tier_dialect
from sapwood.frontends.native.weight_routes import weight_dialect
from sapwood.frontends.observability.calls import ObservedCalls
from sapwood.frontends.observability.routes import observability_dialect
from sapwood.frontends.ollama.routes import ollama_dialect
from sapwood.frontends.openai.routes import openai_dialect
from sapwood.frontends.responses.routes import responses_dialect
from sapwood.frontends.responses.store import ResponseStore
from sapwood.frontends.serving.services import Services
from sapwood.frontends.web.api_docs import api_docs_dialect
from sapwood.frontends.web.routes import web_dialect
from sapwood.http.access import Access, Guarded
from sapwood.http.body import BodyLimits
from sapwood.http.endpoints import Dialect, Endpoint, EndpointTable
from sapwood.http.errors import json_response
from sapwood.http.failures import answer_errors
from sapwood.http.openapi import openapi_document
from sapwood.http.unsupported import NamesUnsupported


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """Where the server keeps responses and batches; None: it keeps none, and says so."""

    responses: ResponseStore | None = None
    batches: BatchStore | None = None

    def close(self) -> None:
        if self.responses is not None:
            self.responses.close()
        if self.batches is not None:
            self.batches.close()


def create_app(
    services: Services,
    *,
    access: Access | None = None,
    body_limits: BodyLimits | None = None,
    stores: Stores | None = None,
) -> FastAPI:
    """An ASGI application; run it with one worker.

    access  who may use the server; None: everybody who reaches it, but no page of another origin
    stores  where responses and batches are kept; the caller runs the batches
    """
    app = inner_app(services, body_limits=body_limits, stores=stores)
    endpoints: EndpointTable = app.state.endpoints
    app.state.has_admin_key = access is not None and access.admin_api_key is not None
    endpoints.check_routes(app.routes)
    app.add_middleware(Guarded, access=access or Access(), endpoints=endpoints)
    # Outermost, so that refused calls are counted too.
    app.add_middleware(
        ObservedCalls,
        observer=services.observer,
        custom_labels_header=services.custom_labels_header,
    )
    return app


def inner_app(
    services: Services, *, body_limits: BodyLimits | None = None, stores: Stores | None = None
) -> FastAPI:
    """The endpoints without their guards, for calls from inside this process."""
    stores = stores or Stores()
    chat_app = _app_of([openai_dialect(services)], services, BodyLimits())
    dialects = [
        openai_dialect(services),
        audio_dialect(services),
        responses_dialect(services, stores.responses, chat_app),
        batches_dialect(services, stores.batches),
        native_dialect(services),
        session_dialect(services),
        weight_dialect(services),
        tier_dialect(services),
        hosts_dialect(services),
        pooling_dialect(services),
        anthropic_dialect(services),
        ollama_dialect(services),
        observability_dialect(services),
        web_dialect(),
        api_docs_dialect(),
    ]
    app = _app_of(dialects, services, body_limits or BodyLimits())
    if services.on_unsupported == "warn":
        app.add_middleware(NamesUnsupported)
    return app


def _app_of(dialects: list[Dialect], services: Services, body_limits: BodyLimits) -> FastAPI:
    """An application of these dialects. It answers errors in the form of their path."""
    # The framework makes no document of its own; its pages would load scripts from elsewhere.
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    endpoints = EndpointTable([*dialects, _documents(app, services)])
    endpoints.mount(app)
    app.state.body_limits = body_limits
    app.state.has_admin_key = False
    answer_errors(app, endpoints)
    return app


def _documents(app: FastAPI, services: Services) -> Dialect:
    """The endpoint that describes all endpoints."""
    dialect = Dialect("documents")

    @cache
    def document() -> dict[str, Any]:
        return openapi_document(app.state.endpoints, title="sapwood", version=services.version)

    @dialect.serves(
        Endpoint(
            paths=("/openapi.json",), methods=("GET", "HEAD"), access="user", is_documented=False
        )
    )
    async def get_document(request: Request) -> Response:
        return json_response(document())

    return dialect
