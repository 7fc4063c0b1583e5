"""Ollama's dialect as a table of endpoints."""

from __future__ import annotations

from fastapi import Request, Response

from sapwood.base.errors import UnsupportedFeature
from sapwood.frontends.common.endpoints import Dialect, Endpoint, Handler
from sapwood.frontends.common.errors import OLLAMA_ERRORS, json_response
from sapwood.frontends.common.services import Services
from sapwood.frontends.ollama import models
from sapwood.frontends.ollama.answer_shapes import (
    OllamaAnswer,
    OllamaModel,
    OllamaModels,
    Version,
)
from sapwood.frontends.ollama.chat import chat, generate_text
from sapwood.frontends.ollama.protocol import (
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaShowRequest,
)

NDJSON = "application/x-ndjson"

_ONE_MODEL = (
    "this server serves the one model that it was started with and keeps it as it is; for another "
    "one, start a server with --model"
)
_NO_EMBEDDINGS = "this server does not compute embeddings"

_NOT_OFFERED = {
    "/api/pull": ("POST", _ONE_MODEL),
    "/api/push": ("POST", _ONE_MODEL),
    "/api/create": ("POST", _ONE_MODEL),
    "/api/copy": ("POST", _ONE_MODEL),
    "/api/delete": ("DELETE", _ONE_MODEL),
    "/api/blobs/{digest}": ("POST", _ONE_MODEL),
    "/api/embed": ("POST", _NO_EMBEDDINGS),
    "/api/embeddings": ("POST", _NO_EMBEDDINGS),
}


def ollama_dialect(services: Services) -> Dialect:
    dialect = Dialect("ollama", errors={"/api": OLLAMA_ERRORS})

    @dialect.serves(
        Endpoint(
            paths=("/api/chat",),
            methods=("POST",),
            access="user",
            body=OllamaChatRequest,
            example={
                "model": "default",
                "messages": [{"role": "user", "content": "Name three trees."}],
                "options": {"num_predict": 32},
                "stream": False,
            },
            answers=(OllamaAnswer, NDJSON),
        )
    )
    async def post_chat(request: Request) -> Response:
        return await chat(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/api/generate",),
            methods=("POST",),
            access="user",
            body=OllamaGenerateRequest,
            example={
                "model": "default",
                "prompt": "The oak is",
                "options": {"num_predict": 16},
                "stream": False,
            },
            answers=(OllamaAnswer, NDJSON),
        )
    )
    async def post_generate(request: Request) -> Response:
        return await generate_text(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/api/show",),
            methods=("POST",),
            access="user",
            body=OllamaShowRequest,
            example={"model": "default"},
            answers=(OllamaModel,),
        )
    )
    async def post_show(request: Request) -> Response:
        return await models.show(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/api/tags",), methods=("GET", "HEAD"), access="user", answers=(OllamaModels,)
        )
    )
    async def get_tags(request: Request) -> Response:
        return json_response(models.tags(services))

    @dialect.serves(
        Endpoint(paths=("/api/ps",), methods=("GET",), access="user", answers=(OllamaModels,))
    )
    async def get_running(request: Request) -> Response:
        return json_response(models.running(services))

    @dialect.serves(
        Endpoint(
            paths=("/api/version",), methods=("GET", "HEAD"), access="user", answers=(Version,)
        )
    )
    async def get_version(request: Request) -> Response:
        return json_response({"version": services.version})

    for path, (method, why) in _NOT_OFFERED.items():
        refused = Endpoint(paths=(path,), methods=(method,), access="user", is_documented=False)
        dialect.serves(refused)(_refuse(why))
    return dialect


def _refuse(why: str) -> Handler:
    async def refuse(request: Request) -> Response:
        raise UnsupportedFeature(f"{request.url.path} is not supported: {why}")

    return refuse
