"""Ollama's dialect as a table of endpoints."""

from __future__ import annotations

from fastapi import Request, Response

from sapwood.base.errors import UnsupportedFeature
from sapwood.frontends.ollama import models
from sapwood.frontends.ollama.answer_shapes import (
    OllamaAnswer,
    OllamaEmbedding,
    OllamaEmbeddings,
    OllamaModel,
    OllamaModels,
    PullStatus,
    Version,
)
from sapwood.frontends.ollama.chat import chat, generate_text
from sapwood.frontends.ollama.embed import embed, embeddings
from sapwood.frontends.ollama.models import ONE_MODEL
from sapwood.frontends.ollama.protocol import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaPullRequest,
    OllamaShowRequest,
)
from sapwood.frontends.ollama.pull import pull
from sapwood.frontends.ollama.stream import NDJSON
from sapwood.frontends.serving.services import Services
from sapwood.http.endpoints import Dialect, Endpoint, EndpointRows
from sapwood.http.errors import OLLAMA_ERRORS, json_response

_NOT_OFFERED = {
    "/api/push": "POST",
    "/api/create": "POST",
    "/api/copy": "POST",
    "/api/delete": "DELETE",
    "/api/blobs/{digest}": "POST",
}


ROWS: EndpointRows[Services] = EndpointRows()


def ollama_dialect(services: Services) -> Dialect:
    return ROWS.dialect("ollama", services, errors={"/api": OLLAMA_ERRORS})


@ROWS.serves(
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
async def post_chat(request: Request, services: Services) -> Response:
    return await chat(request, services)


@ROWS.serves(
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
async def post_generate(request: Request, services: Services) -> Response:
    return await generate_text(request, services)


@ROWS.serves(
    Endpoint(
        paths=("/api/show",),
        methods=("POST",),
        access="user",
        body=OllamaShowRequest,
        example={"model": "default"},
        answers=(OllamaModel,),
    )
)
async def post_show(request: Request, services: Services) -> Response:
    return await models.show(request, services)


@ROWS.serves(
    Endpoint(
        paths=("/api/embed",),
        methods=("POST",),
        access="user",
        body=OllamaEmbedRequest,
        example={"model": "default", "input": ["The oak is old.", "The elm is young."]},
        answers=(OllamaEmbeddings,),
    )
)
async def post_embed(request: Request, services: Services) -> Response:
    return await embed(request, services)


@ROWS.serves(
    Endpoint(
        paths=("/api/embeddings",),
        methods=("POST",),
        access="user",
        body=OllamaEmbeddingsRequest,
        example={"model": "default", "prompt": "The oak is old."},
        answers=(OllamaEmbedding,),
        is_deprecated=True,
    )
)
async def post_embeddings(request: Request, services: Services) -> Response:
    return await embeddings(request, services)


@ROWS.serves(
    Endpoint(
        paths=("/api/pull",),
        methods=("POST",),
        access="user",
        body=OllamaPullRequest,
        example={"model": "default", "stream": False},
        answers=(PullStatus, NDJSON),
    )
)
async def post_pull(request: Request, services: Services) -> Response:
    return await pull(request, services)


@ROWS.serves(
    Endpoint(paths=("/api/tags",), methods=("GET",), access="user", answers=(OllamaModels,))
)
async def get_tags(request: Request, services: Services) -> Response:
    return json_response(models.tags(services))


@ROWS.serves(Endpoint(paths=("/api/ps",), methods=("GET",), access="user", answers=(OllamaModels,)))
async def get_running(request: Request, services: Services) -> Response:
    return json_response(models.running(services))


@ROWS.serves(Endpoint(paths=("/api/version",), methods=("GET",), access="user", answers=(Version,)))
async def get_version(request: Request, services: Services) -> Response:
    return json_response({"version": services.version})


async def _refuse(request: Request, services: Services) -> Response:
    raise UnsupportedFeature(f"{request.url.path} is not supported: {ONE_MODEL}")


for _path, _method in _NOT_OFFERED.items():
    ROWS.serves(Endpoint(paths=(_path,), methods=(_method,), access="user", is_documented=False))(
        _refuse
    )
