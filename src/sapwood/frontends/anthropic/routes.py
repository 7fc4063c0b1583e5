"""Where Anthropic's dialect is mounted."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from sapwood.base.errors import UnsupportedFeature
from sapwood.frontends.anthropic.messages import count_tokens, create_message
from sapwood.frontends.anthropic.protocol import CountTokensRequest, MessagesRequest
from sapwood.frontends.common.openapi import json_body
from sapwood.frontends.common.services import Services

ANTHROPIC_BODIES = (MessagesRequest, CountTokensRequest)


def anthropic_router(services: Services) -> APIRouter:
    """The headers anthropic-version, anthropic-beta and x-api-key change nothing."""
    router = APIRouter(prefix="/v1/messages", tags=["anthropic"])

    @router.post("", openapi_extra=json_body(MessagesRequest))
    async def post_messages(request: Request) -> Response:
        return await create_message(request, services)

    @router.post("/count_tokens", openapi_extra=json_body(CountTokensRequest))
    async def post_count_tokens(request: Request) -> Response:
        return await count_tokens(request, services)

    # Anthropic's own batches bring their lines along, have other results and other states.
    for path in ("/batches", "/batches/{rest:path}"):
        router.add_api_route(
            path, _no_batches, methods=["GET", "POST", "DELETE"], include_in_schema=False
        )
    return router


async def _no_batches(request: Request) -> Response:
    raise UnsupportedFeature(
        f"{request.url.path} is not supported; use /v1/files and /v1/batches, as OpenAI's API has "
        "them, whose lines call /v1/chat/completions"
    )
