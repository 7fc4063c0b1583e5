"""Where the Responses API is mounted."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request, Response
from starlette.types import ASGIApp

from sapwood.base.errors import UnsupportedFeature
from sapwood.frontends.common.openapi import (
    NestedError,
    described,
    path_parameter,
    query_parameter,
)
from sapwood.frontends.common.services import Services
from sapwood.frontends.responses.protocol import (
    ResponseDeleted,
    ResponseItems,
    ResponseObject,
    ResponsesRequest,
)
from sapwood.frontends.responses.service import Responses
from sapwood.frontends.responses.store import ResponseStore

RESPONSES_BODIES = (ResponsesRequest, ResponseObject, ResponseDeleted, ResponseItems)

_ID = path_parameter("response_id")
_STREAM = {"text/event-stream": "event-stream"}
_INCLUDE = query_parameter("include[]", type="array", items={"type": "string"})
_RETRIEVE = (
    _ID,
    query_parameter("stream", type="string", enum=["false", "true"], default="false"),
    query_parameter("starting_after", type="integer", minimum=0),
    _INCLUDE,
)
_ITEMS = (
    _ID,
    query_parameter("after", type="string"),
    query_parameter("limit", type="integer", minimum=1, maximum=100, default=20),
    query_parameter("order", type="string", enum=["desc", "asc"], default="desc"),
    _INCLUDE,
)


def responses_router(
    services: Services, store: ResponseStore | None, chat_app: ASGIApp
) -> APIRouter:
    """store: where responses are kept, if they are; chat_app: answers chat completions."""
    router = APIRouter(prefix="/v1/responses", tags=["responses"])
    api = Responses(services, store, chat_app)
    about = partial(described, error=NestedError, errors=(400, 404))

    @router.post(
        "",
        openapi_extra=about(
            ResponseObject, body=ResponsesRequest, also=_STREAM, errors=(400, 404, 413, 503)
        ),
    )
    async def post_response(request: Request) -> Response:
        return await api.create(request)

    @router.get(
        "/{response_id}", openapi_extra=about(ResponseObject, parameters=_RETRIEVE, also=_STREAM)
    )
    async def get_response(request: Request) -> Response:
        return await api.retrieve(request)

    @router.delete("/{response_id}", openapi_extra=about(ResponseDeleted, parameters=(_ID,)))
    async def delete_response(request: Request) -> Response:
        return await api.delete(request)

    @router.post("/{response_id}/cancel", openapi_extra=about(ResponseObject, parameters=(_ID,)))
    async def post_cancel(request: Request) -> Response:
        return await api.cancel(request)

    @router.get("/{response_id}/input_items", openapi_extra=about(ResponseItems, parameters=_ITEMS))
    async def get_input_items(request: Request) -> Response:
        return await api.list_input_items(request)

    @router.post("/input_tokens", include_in_schema=False)
    @router.post("/compact", include_in_schema=False)
    async def not_offered(request: Request) -> Response:
        raise UnsupportedFeature(f"{request.url.path} is not supported by this server")

    return router
