"""The endpoints whose answers come from a worker as they are.

Only these paths go to workers. So what steers an engine, such as loading weights, cannot be reached
with a user's key, nor on one worker by chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from starlette.requests import Request
from starlette.responses import Response

from sapwood.gateway.exchange import Proxy
from sapwood.gateway.proxy import Forwarded
from sapwood.http.endpoints import Dialect, Endpoint, Handler
from sapwood.http.errors import (
    ANTHROPIC_ERRORS,
    NATIVE_ERRORS,
    OLLAMA_ERRORS,
    OPENAI_ERRORS,
    ErrorForm,
)

_POSTS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/generate",
    "/v1/embeddings",
    "/v1/messages/count_tokens",
    "/v1/classify",
    "/v1/score",
    "/v1/rerank",
    "/rerank",
    "/v1/tokenize",
    "/tokenize",
    "/v1/detokenize",
    "/detokenize",
    "/encode",
    "/classify",
    "/invocations",
    "/vertex_generate",
    "/parse_function_call",
    "/separate_reasoning",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/videos",
    "/api/chat",
    "/api/generate",
    "/api/embed",
    "/api/embeddings",
    "/api/show",
)
_GETS = (
    "/health_generate",
    "/model_info",
    "/get_model_info",
    "/server_info",
    "/get_server_info",
    "/openapi.json",
    "/api/tags",
    "/api/ps",
    "/api/version",
)

FORMS: Mapping[str, ErrorForm] = MappingProxyType(
    {
        "/v1": OPENAI_ERRORS,
        "/v1/responses": NATIVE_ERRORS,
        "/v1/messages": ANTHROPIC_ERRORS,
        "/api": OLLAMA_ERRORS,
    }
)
"""How errors of the gateway itself are spelled, as the engines spell theirs."""


def forwarded_dialect(proxy: Proxy, own: Mapping[str, Handler] = MappingProxyType({})) -> Dialect:
    """own: path -> what answers it, if that is not a worker or not a worker alone"""
    dialect = Dialect("forwarded", errors=FORMS)

    async def forward(request: Request) -> Response:
        return Forwarded(proxy, request)

    for path in _POSTS:
        dialect.serves(
            Endpoint(paths=(path,), methods=("POST",), access="user", is_documented=False)
        )(own.get(path, forward))
    for path in _GETS:
        dialect.serves(
            Endpoint(
                paths=(path,),
                methods=("GET",),
                access="user",
                get_has_effect=path == "/health_generate",
                is_documented=False,
            )
        )(forward)
    return dialect
