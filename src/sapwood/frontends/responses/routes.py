"""The Responses API as a table of endpoints."""

from __future__ import annotations

from fastapi import Request, Response
from starlette.types import ASGIApp

from sapwood.base.errors import UnsupportedFeature
from sapwood.frontends.responses.protocol import (
    ResponseDeleted,
    ResponseItems,
    ResponseObject,
    ResponsesRequest,
)
from sapwood.frontends.responses.service import Responses
from sapwood.frontends.responses.store import ResponseStore
from sapwood.frontends.serving.services import Services
from sapwood.http.endpoints import Dialect, Endpoint, query_parameter
from sapwood.http.errors import NATIVE_ERRORS
from sapwood.http.openapi import SSE

_INCLUDE = query_parameter("include[]", type="array", items={"type": "string"})
_RETRIEVE = (
    query_parameter("stream", type="string", enum=["false", "true"], default="false"),
    query_parameter("starting_after", type="integer", minimum=0),
    _INCLUDE,
)
_ITEMS = (
    query_parameter("after", type="string"),
    query_parameter("limit", type="integer", minimum=1, maximum=100, default=20),
    query_parameter("order", type="string", enum=["desc", "asc"], default="desc"),
    _INCLUDE,
)


def responses_dialect(
    services: Services, store: ResponseStore | None, chat_app: ASGIApp
) -> Dialect:
    """The endpoints of the Responses API.

    store     where responses are kept; None: nowhere
    chat_app  the application that answers chat completions
    """
    # These errors are nested, as OpenAI has them; the older endpoints keep the flat form that
    # SGLang's clients know.
    dialect = Dialect("responses", errors={"/v1/responses": NATIVE_ERRORS})
    api = Responses(services, store, chat_app)

    @dialect.serves(
        Endpoint(
            paths=("/v1/responses",),
            methods=("POST",),
            access="user",
            body=ResponsesRequest,
            example={"input": "Name three trees.", "max_output_tokens": 32, "store": False},
            answers=(ResponseObject, SSE),
        )
    )
    async def post_response(request: Request) -> Response:
        return await api.create(request)

    @dialect.serves(
        Endpoint(
            paths=("/v1/responses/{response_id}",),
            methods=("GET",),
            access="user",
            answers=(ResponseObject, SSE),
            parameters=_RETRIEVE,
        )
    )
    async def get_response(request: Request) -> Response:
        return await api.retrieve(request)

    @dialect.serves(
        Endpoint(
            paths=("/v1/responses/{response_id}",),
            methods=("DELETE",),
            access="user",
            answers=(ResponseDeleted,),
        )
    )
    async def delete_response(request: Request) -> Response:
        return await api.delete(request)

    @dialect.serves(
        Endpoint(
            paths=("/v1/responses/{response_id}/cancel",),
            methods=("POST",),
            access="user",
            answers=(ResponseObject,),
        )
    )
    async def post_cancel(request: Request) -> Response:
        return await api.cancel(request)

    @dialect.serves(
        Endpoint(
            paths=("/v1/responses/{response_id}/input_items",),
            methods=("GET",),
            access="user",
            answers=(ResponseItems,),
            parameters=_ITEMS,
        )
    )
    async def get_input_items(request: Request) -> Response:
        return await api.list_input_items(request)

    @dialect.serves(
        Endpoint(
            paths=("/v1/responses/input_tokens", "/v1/responses/compact"),
            methods=("POST",),
            access="user",
            is_documented=False,
        )
    )
    async def not_offered(request: Request) -> Response:
        raise UnsupportedFeature(f"{request.url.path} is not supported by this server")

    return dialect
