"""Where Ollama's dialect is mounted."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response

from sapwood.base.errors import UnsupportedFeature
from sapwood.frontends.common.errors import json_response
from sapwood.frontends.common.openapi import json_body
from sapwood.frontends.common.services import Services
from sapwood.frontends.ollama import models
from sapwood.frontends.ollama.chat import chat, generate_text
from sapwood.frontends.ollama.protocol import (
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaShowRequest,
)

OLLAMA_BODIES = (OllamaChatRequest, OllamaGenerateRequest, OllamaShowRequest)

_ONE_MODEL = (
    "this server serves the one model that it was started with and keeps it as it is; for another "
    "one, start a server with --model"
)
_NO_EMBEDDINGS = "this server does not compute embeddings"

_NOT_OFFERED = {
    "/pull": ("POST", _ONE_MODEL),
    "/push": ("POST", _ONE_MODEL),
    "/create": ("POST", _ONE_MODEL),
    "/copy": ("POST", _ONE_MODEL),
    "/delete": ("DELETE", _ONE_MODEL),
    "/blobs/{digest}": ("POST", _ONE_MODEL),
    "/embed": ("POST", _NO_EMBEDDINGS),
    "/embeddings": ("POST", _NO_EMBEDDINGS),
}


def ollama_router(services: Services) -> APIRouter:
    router = APIRouter(prefix="/api", tags=["ollama"])

    @router.post("/chat", openapi_extra=json_body(OllamaChatRequest))
    async def post_chat(request: Request) -> Response:
        return await chat(request, services)

    @router.post("/generate", openapi_extra=json_body(OllamaGenerateRequest))
    async def post_generate(request: Request) -> Response:
        return await generate_text(request, services)

    @router.post("/show", openapi_extra=json_body(OllamaShowRequest))
    async def post_show(request: Request) -> Response:
        return await models.show(request, services)

    @router.head("/tags", include_in_schema=False)
    @router.get("/tags")
    async def get_tags() -> Response:
        return json_response(models.tags(services))

    @router.get("/ps")
    async def get_running() -> Response:
        return json_response(models.running(services))

    @router.head("/version", include_in_schema=False)
    @router.get("/version")
    async def get_version() -> Response:
        return json_response({"version": services.version})

    for path, (method, why) in _NOT_OFFERED.items():
        router.add_api_route(path, _refuse(why), methods=[method], include_in_schema=False)
    return router


def _refuse(why: str) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def refuse(request: Request) -> Response:
        raise UnsupportedFeature(f"{request.url.path} is not supported: {why}")

    return refuse
