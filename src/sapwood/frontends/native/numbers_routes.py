"""Where the routes are mounted that answer with numbers: vectors, classes, scores, ranks."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from sapwood.frontends.common.openapi import json_body
from sapwood.frontends.common.services import Services
from sapwood.frontends.native.classify import ClassifyRequest, classify
from sapwood.frontends.native.encode import EncodeRequest, classify_raw, encode
from sapwood.frontends.native.rerank import RerankRequest, rerank
from sapwood.frontends.native.score import ScoreRequest, score
from sapwood.frontends.openai.embeddings import EmbeddingsRequest, embeddings

NUMBERS_BODIES = (EncodeRequest, ClassifyRequest, ScoreRequest, RerankRequest, EmbeddingsRequest)


def numbers_router(services: Services) -> APIRouter:
    router = APIRouter(tags=["numbers"])

    @router.put("/encode", openapi_extra=json_body(EncodeRequest))
    @router.post("/encode", openapi_extra=json_body(EncodeRequest))
    async def post_encode(request: Request) -> Response:
        return await encode(request, services)

    @router.put("/classify", openapi_extra=json_body(EncodeRequest))
    @router.post("/classify", openapi_extra=json_body(EncodeRequest))
    async def post_classify_raw(request: Request) -> Response:
        return await classify_raw(request, services)

    @router.post("/v1/embeddings", openapi_extra=json_body(EmbeddingsRequest))
    async def post_embeddings(request: Request) -> Response:
        return await embeddings(request, services)

    @router.post("/v1/classify", openapi_extra=json_body(ClassifyRequest))
    async def post_classify(request: Request) -> Response:
        return await classify(request, services)

    @router.post("/v1/score", openapi_extra=json_body(ScoreRequest))
    async def post_score(request: Request) -> Response:
        return await score(request, services)

    @router.put("/v1/rerank", openapi_extra=json_body(RerankRequest))
    @router.post("/v1/rerank", openapi_extra=json_body(RerankRequest))
    async def post_rerank(request: Request) -> Response:
        return await rerank(request, services)

    return router
