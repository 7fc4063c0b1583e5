"""Where SGLang's own dialect is mounted."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from sapwood.frontends.common.errors import json_response
from sapwood.frontends.common.openapi import json_body
from sapwood.frontends.common.services import Services
from sapwood.frontends.native import admin
from sapwood.frontends.native.generate import generate_text
from sapwood.frontends.native.parsing import (
    ParseFunctionCallRequest,
    SeparateReasoningRequest,
    parse_function_call,
    separate_reasoning,
)
from sapwood.frontends.native.protocol import AbortRequest, GenerateRequest
from sapwood.frontends.native.tokens import (
    DetokenizeRequest,
    TokenizeRequest,
    detokenize,
    tokenize,
)


def native_router(services: Services) -> APIRouter:
    router = APIRouter(tags=["native"])

    @router.put("/generate", openapi_extra=json_body(GenerateRequest))
    @router.post("/generate", openapi_extra=json_body(GenerateRequest))
    async def generate(request: Request) -> Response:
        return await generate_text(request, services)

    @router.post("/tokenize", openapi_extra=json_body(TokenizeRequest))
    @router.post("/v1/tokenize", openapi_extra=json_body(TokenizeRequest))
    async def post_tokenize(request: Request) -> Response:
        return await tokenize(request, services)

    @router.post("/detokenize", openapi_extra=json_body(DetokenizeRequest))
    @router.post("/v1/detokenize", openapi_extra=json_body(DetokenizeRequest))
    async def post_detokenize(request: Request) -> Response:
        return await detokenize(request, services)

    @router.post("/parse_function_call", openapi_extra=json_body(ParseFunctionCallRequest))
    async def post_parse_function_call(request: Request) -> Response:
        return await parse_function_call(request, services)

    @router.post("/separate_reasoning", openapi_extra=json_body(SeparateReasoningRequest))
    async def post_separate_reasoning(request: Request) -> Response:
        return await separate_reasoning(request, services)

    @router.get("/health")
    async def get_health() -> Response:
        return admin.health(services)

    @router.get("/health_generate")
    async def get_health_generate(request: Request) -> Response:
        return await admin.health_generate(request, services)

    @router.get("/model_info")
    @router.get("/get_model_info")
    async def get_model_info() -> Response:
        return json_response(admin.model_info(services))

    @router.get("/server_info")
    @router.get("/get_server_info")
    async def get_server_info() -> Response:
        return json_response(await admin.server_info(services))

    @router.get("/flush_cache")
    @router.post("/flush_cache")
    async def flush_cache() -> Response:
        return await admin.flush_cache(services)

    @router.post("/abort_request", openapi_extra=json_body(AbortRequest))
    async def abort_request(request: Request) -> Response:
        return await admin.abort_request(request, services)

    return router
