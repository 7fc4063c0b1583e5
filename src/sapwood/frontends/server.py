"""The ASGI application: all dialects over one set of services."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from sapwood.base.errors import NotFound, SapwoodError
from sapwood.frontends.anthropic.routes import ANTHROPIC_BODIES, anthropic_router
from sapwood.frontends.batches.routes import BATCH_BODIES, batches_router
from sapwood.frontends.batches.store import BatchStore
from sapwood.frontends.common.access import Access, Guarded
from sapwood.frontends.common.errors import (
    WrongMethod,
    body_for_path,
    error_response,
    internal_error,
)
from sapwood.frontends.common.limits import BodyLimits
from sapwood.frontends.common.openapi import ERROR_BODIES, component_schemas
from sapwood.frontends.common.services import Services
from sapwood.frontends.common.sse import Disconnected
from sapwood.frontends.documented import complete
from sapwood.frontends.hosts.routes import HOST_BODIES, hosts_router
from sapwood.frontends.native.numbers_routes import NUMBERS_BODIES, numbers_router
from sapwood.frontends.native.parsing import PARSING_BODIES
from sapwood.frontends.native.protocol import AbortRequest, GenerateRequest
from sapwood.frontends.native.routes import native_router
from sapwood.frontends.native.tokens import DetokenizeRequest, TokenizeRequest
from sapwood.frontends.observability.calls import ObservedCalls
from sapwood.frontends.observability.routes import OBSERVABILITY_BODIES, observability_router
from sapwood.frontends.ollama.routes import OLLAMA_BODIES, ollama_router
from sapwood.frontends.openai.protocol import ChatRequest, CompletionRequest
from sapwood.frontends.openai.routes import openai_router
from sapwood.frontends.responses.routes import RESPONSES_BODIES, responses_router
from sapwood.frontends.responses.store import ResponseStore
from sapwood.frontends.web.routes import web_router

_BODIES = (
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    AbortRequest,
    TokenizeRequest,
    DetokenizeRequest,
    *PARSING_BODIES,
    *NUMBERS_BODIES,
    *ANTHROPIC_BODIES,
    *OLLAMA_BODIES,
    *OBSERVABILITY_BODIES,
    *RESPONSES_BODIES,
    *BATCH_BODIES,
    *HOST_BODIES,
    *ERROR_BODIES,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """None: the server keeps none of them, and says so."""

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

    access  who may use it; None: whoever reaches it, but no web page of another origin
    stores  what outlives a request; whoever gives them runs the batches
    """
    app = inner_app(services, body_limits=body_limits, stores=stores)
    app.add_middleware(Guarded, access=access or Access())
    # Outermost, so that what the others refuse is counted too.
    app.add_middleware(
        ObservedCalls,
        observer=services.observer,
        custom_labels_header=services.custom_labels_header,
    )
    return app


def inner_app(
    services: Services, *, body_limits: BodyLimits | None = None, stores: Stores | None = None
) -> FastAPI:
    """The routes without what guards them, for calls from inside this process."""
    stores = stores or Stores()
    chat_app = _bare_app(services, BodyLimits())
    chat_app.include_router(openai_router(services))
    app = _bare_app(services, body_limits or BodyLimits())
    app.include_router(openai_router(services))
    app.include_router(responses_router(services, stores.responses, chat_app))
    app.include_router(batches_router(services, stores.batches))
    app.include_router(native_router(services))
    app.include_router(hosts_router(services))
    app.include_router(numbers_router(services))
    app.include_router(anthropic_router(services))
    app.include_router(ollama_router(services))
    app.include_router(observability_router(services))
    app.include_router(web_router())
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _bare_app(services: Services, body_limits: BodyLimits) -> FastAPI:
    """No routes yet; errors are answered as the dialect of their path has them."""
    app = FastAPI(
        title="sapwood",
        version=services.version,
        # The interactive pages load their scripts from elsewhere; /openapi.json needs nothing.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.body_limits = body_limits
    app.add_exception_handler(SapwoodError, _refused)
    app.add_exception_handler(HTTPException, _not_routed)
    app.add_exception_handler(Disconnected, _left)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(Exception, _failed)
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, SapwoodError)
    return error_response(error, body_for_path(request.url.path))


async def _not_routed(request: Request, error: Exception) -> Response:
    """Wrong paths and methods; the framework raises nothing else here."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    problem: SapwoodError
    if error.status_code == 405:
        problem = WrongMethod(f"{path} does not take {method}; see /openapi.json")
    else:
        problem = NotFound(f"there is no {method} {path}; see /openapi.json")
    response = error_response(problem, body_for_path(path))
    response.headers.update(error.headers or {})
    return response


async def _left(request: Request, error: Exception) -> Response:
    """Nobody reads this; 499 is what access logs show for a client that left."""
    return Response(status_code=499)


async def _failed(request: Request, error: Exception) -> Response:
    """A bug of ours: the framework raises it again for the server's log after this answer."""
    return error_response(internal_error(), body_for_path(request.url.path))


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        components = document.setdefault("components", {})
        components.setdefault("schemas", {}).update(component_schemas(_BODIES))
        complete(document)
        app.openapi_schema = document
    return app.openapi_schema
