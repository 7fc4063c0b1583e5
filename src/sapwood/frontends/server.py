"""The ASGI application: all dialects over one set of services."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from sapwood.base.errors import NotFound, SapwoodError
from sapwood.frontends.anthropic.routes import ANTHROPIC_BODIES, anthropic_router
from sapwood.frontends.common.errors import (
    WrongMethod,
    body_for_path,
    error_response,
    internal_error,
)
from sapwood.frontends.common.openapi import component_schemas
from sapwood.frontends.common.origin import SameOriginOnly
from sapwood.frontends.common.services import Services
from sapwood.frontends.common.sse import Disconnected
from sapwood.frontends.native.protocol import AbortRequest, GenerateRequest
from sapwood.frontends.native.routes import native_router
from sapwood.frontends.native.tokens import DetokenizeRequest, TokenizeRequest
from sapwood.frontends.ollama.routes import OLLAMA_BODIES, ollama_router
from sapwood.frontends.openai.protocol import ChatRequest, CompletionRequest
from sapwood.frontends.openai.routes import openai_router
from sapwood.frontends.web.routes import web_router

_BODIES = (
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    AbortRequest,
    TokenizeRequest,
    DetokenizeRequest,
    *ANTHROPIC_BODIES,
    *OLLAMA_BODIES,
)


def create_app(services: Services) -> FastAPI:
    """An ASGI application without background work of its own; run it with one worker.

    The only middleware hands a request's messages on as they are: some kinds hide a client's
    disconnect, and then its request would go on.
    """
    app = FastAPI(
        title="sapwood",
        version=services.version,
        # The interactive pages load their scripts from elsewhere; /openapi.json needs nothing.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(SameOriginOnly)
    app.include_router(openai_router(services))
    app.include_router(native_router(services))
    app.include_router(anthropic_router(services))
    app.include_router(ollama_router(services))
    app.include_router(web_router())
    app.add_exception_handler(SapwoodError, _refused)
    app.add_exception_handler(HTTPException, _not_routed)
    app.add_exception_handler(Disconnected, _left)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(Exception, _failed)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
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
        app.openapi_schema = document
    return app.openapi_schema
