"""The endpoints of models that do not generate: embeddings, classes, scores, ranks."""

from __future__ import annotations

from fastapi import Request, Response

from sapwood.frontends.native.answer_shapes import Classes, PoolingAnswer, Ranked, Scores
from sapwood.frontends.native.classify import ClassifyRequest, classify
from sapwood.frontends.native.encode import EncodeRequest, classify_raw, encode
from sapwood.frontends.native.rerank import RerankRequest, rerank
from sapwood.frontends.native.score import ScoreRequest, score
from sapwood.frontends.openai.answer_shapes import EmbeddingList
from sapwood.frontends.openai.embeddings import EmbeddingsRequest, embeddings
from sapwood.frontends.serving.services import Services
from sapwood.http.endpoints import Dialect, Endpoint


def pooling_dialect(services: Services) -> Dialect:
    dialect = Dialect("pooling")

    @dialect.serves(
        Endpoint(
            paths=("/encode",),
            methods=("POST", "PUT"),
            access="user",
            body=EncodeRequest,
            example={"text": "The oak is a tree."},
            answers=(PoolingAnswer | list[PoolingAnswer],),
        )
    )
    async def post_encode(request: Request) -> Response:
        return await encode(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/classify",),
            methods=("POST", "PUT"),
            access="user",
            body=EncodeRequest,
            example={"text": "The oak is a tree."},
            answers=(PoolingAnswer | list[PoolingAnswer],),
        )
    )
    async def post_classify_raw(request: Request) -> Response:
        return await classify_raw(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/v1/embeddings",),
            methods=("POST",),
            access="user",
            body=EmbeddingsRequest,
            example={"input": "The oak is a tree."},
            answers=(EmbeddingList,),
        )
    )
    async def post_embeddings(request: Request) -> Response:
        return await embeddings(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/v1/classify",),
            methods=("POST",),
            access="user",
            body=ClassifyRequest,
            example={"input": "The oak is a tree."},
            answers=(Classes,),
        )
    )
    async def post_classify(request: Request) -> Response:
        return await classify(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/v1/score",),
            methods=("POST",),
            access="user",
            body=ScoreRequest,
            example={
                "query": "The oak is a",
                "items": [" tree", " fish"],
                "label_token_ids": [1, 2],
            },
            answers=(Scores,),
        )
    )
    async def post_score(request: Request) -> Response:
        return await score(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/v1/rerank",),
            methods=("POST", "PUT"),
            access="user",
            body=RerankRequest,
            example={"query": "What is an oak?", "documents": ["A tree.", "A fish."]},
            answers=(list[Ranked],),
        )
    )
    async def post_rerank(request: Request) -> Response:
        return await rerank(request, services)

    return dialect
