"""Where OpenAI's dialect is mounted."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from sapwood.frontends.anthropic.models import (
    ANTHROPIC_VERSION,
    anthropic_model,
    anthropic_models,
)
from sapwood.frontends.common.errors import json_response
from sapwood.frontends.common.openapi import json_body
from sapwood.frontends.common.services import Services
from sapwood.frontends.openai.chat import chat_completions
from sapwood.frontends.openai.completions import completions
from sapwood.frontends.openai.models import model_card, model_list
from sapwood.frontends.openai.protocol import ChatRequest, CompletionRequest


def openai_router(services: Services) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["openai"])

    @router.post("/chat/completions", openapi_extra=json_body(ChatRequest))
    async def post_chat_completions(request: Request) -> Response:
        return await chat_completions(request, services)

    @router.post("/completions", openapi_extra=json_body(CompletionRequest))
    async def post_completions(request: Request) -> Response:
        return await completions(request, services)

    @router.get("/models")
    async def get_models(request: Request) -> Response:
        is_anthropic = ANTHROPIC_VERSION in request.headers
        return json_response((anthropic_models if is_anthropic else model_list)(services))

    @router.get("/models/{model:path}")
    async def get_model(request: Request, model: str) -> Response:
        services.check_model(model)
        is_anthropic = ANTHROPIC_VERSION in request.headers
        return json_response((anthropic_model if is_anthropic else model_card)(services))

    return router
