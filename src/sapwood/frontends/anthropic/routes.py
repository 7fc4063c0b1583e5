"""Anthropic's dialect as a table of endpoints."""

from __future__ import annotations

from fastapi import Request, Response

from sapwood.base.errors import UnsupportedFeature
from sapwood.frontends.anthropic.answer_shapes import MessageAnswer, TokenCount
from sapwood.frontends.anthropic.messages import count_tokens, create_message
from sapwood.frontends.anthropic.protocol import CountTokensRequest, MessagesRequest
from sapwood.frontends.serving.services import Services
from sapwood.http.endpoints import Dialect, Endpoint
from sapwood.http.errors import ANTHROPIC_ERRORS
from sapwood.http.openapi import SSE

_PROMPT = {
    "model": "default",
    "messages": [{"role": "user", "content": "Name three trees."}],
}


def anthropic_dialect(services: Services) -> Dialect:
    """The headers anthropic-version, anthropic-beta and x-api-key change nothing."""
    dialect = Dialect("anthropic", errors={"/v1/messages": ANTHROPIC_ERRORS})

    @dialect.serves(
        Endpoint(
            paths=("/v1/messages",),
            methods=("POST",),
            access="user",
            body=MessagesRequest,
            example={**_PROMPT, "max_tokens": 32},
            answers=(MessageAnswer, SSE),
        )
    )
    async def post_messages(request: Request) -> Response:
        return await create_message(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/v1/messages/count_tokens",),
            methods=("POST",),
            access="user",
            body=CountTokensRequest,
            example=_PROMPT,
            answers=(TokenCount,),
        )
    )
    async def post_count_tokens(request: Request) -> Response:
        return await count_tokens(request, services)

    # Anthropic's own batches bring their lines along, have other results and other states.
    @dialect.serves(
        Endpoint(
            paths=("/v1/messages/batches", "/v1/messages/batches/{rest:path}"),
            methods=("GET", "POST", "DELETE"),
            access="user",
            is_documented=False,
        )
    )
    async def no_batches(request: Request) -> Response:
        raise UnsupportedFeature(
            f"{request.url.path} is not supported; use /v1/files and /v1/batches, as OpenAI's API "
            "has them, whose lines call /v1/chat/completions"
        )

    return dialect
