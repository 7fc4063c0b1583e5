"""OpenAI's dialect as a table of endpoints."""

from __future__ import annotations

from fastapi import Request, Response

from sapwood.frontends.anthropic.models import (
    ANTHROPIC_VERSION,
    anthropic_model,
    anthropic_models,
)
from sapwood.frontends.openai.answer_shapes import ChatAnswer, ModelCard, ModelList
from sapwood.frontends.openai.chat import chat_completions
from sapwood.frontends.openai.completions import completions
from sapwood.frontends.openai.models import card_of, model_list
from sapwood.frontends.openai.protocol import ChatRequest, CompletionRequest
from sapwood.frontends.serving.services import Services
from sapwood.http.endpoints import Dialect, Endpoint
from sapwood.http.errors import OPENAI_ERRORS, json_response
from sapwood.http.openapi import SSE

CHAT_EXAMPLE = {"messages": [{"role": "user", "content": "Name three trees."}], "max_tokens": 32}


def openai_dialect(services: Services) -> Dialect:
    dialect = Dialect("openai", errors={"/v1": OPENAI_ERRORS})

    @dialect.serves(
        Endpoint(
            paths=("/v1/chat/completions",),
            methods=("POST",),
            access="user",
            body=ChatRequest,
            example=CHAT_EXAMPLE,
            answers=(ChatAnswer, SSE),
        )
    )
    async def post_chat_completions(request: Request) -> Response:
        return await chat_completions(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/v1/completions",),
            methods=("POST",),
            access="user",
            body=CompletionRequest,
            example={"prompt": "The oak is", "max_tokens": 16},
            answers=(ChatAnswer, SSE),
        )
    )
    async def post_completions(request: Request) -> Response:
        return await completions(request, services)

    @dialect.serves(
        Endpoint(paths=("/v1/models",), methods=("GET",), access="user", answers=(ModelList,))
    )
    async def get_models(request: Request) -> Response:
        is_anthropic = ANTHROPIC_VERSION in request.headers
        return json_response((anthropic_models if is_anthropic else model_list)(services))

    @dialect.serves(
        Endpoint(
            paths=("/v1/models/{model:path}",),
            methods=("GET",),
            access="user",
            answers=(ModelCard,),
        )
    )
    async def get_model(request: Request) -> Response:
        card = card_of(services, request.path_params["model"])
        is_anthropic = ANTHROPIC_VERSION in request.headers
        return json_response(anthropic_model(services) if is_anthropic else card)

    return dialect
