"""POST /v1/embeddings. Source: OpenAI's API reference; parity with SGLang 0.5.8."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.openai.chat import chat_message
from sapwood.frontends.peer_fields import BOOKKEEPING, CLIENT, PLACEMENT, REPLICA
from sapwood.frontends.serving.embed import (
    Text,
    check_dimensions,
    embed_all,
    request_ids,
    texts_of,
)
from sapwood.frontends.serving.embed_prompts import EmbedPrompt, prompt_of_item, rendered
from sapwood.frontends.serving.media import MediaParts
from sapwood.frontends.serving.services import Services
from sapwood.http.body import read_json
from sapwood.http.errors import json_response
from sapwood.http.routing import routing_key
from sapwood.http.sse import until_disconnect
from sapwood.schema.fields import Count, FieldTable, Int64, NotOffered, TokenId, parse
from sapwood.schema.limits import RequestId, RoutingKey
from sapwood.schema.request import RequestOptions
from sapwood.text.embedding import EmbedRequest, PoolingOutput, shortened

MOST_ITEMS = 256
"""Objects of one request, each of which may show a picture and a video."""


class EmbeddingsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/embeddings.

    input            a text, one text's token ids, or a list of either; or a list of objects with a
                     text, an image or a video (frontends/serving/embed_prompts.py)
    messages         in the place of input: a conversation, whose prompt is one text
    add_generation_prompt  whether that prompt ends with the beginning of an answer
    dimensions       length to which embeddings are cut; default: not cut
    encoding_format  "float", or "base64" for little-endian fp32
    """

    input: str | list[str | TokenId | list[TokenId] | dict[str, Any]] | None = None
    messages: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = False
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    rid: RequestId | list[RequestId] | None = None
    priority: Int64 | None = None
    routing_key: RoutingKey = ""
    data_parallel_rank: Int64 | None = None


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    embedding: list[float] | str
    index: int
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(msgspec.Struct, frozen=True, kw_only=True):
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


EMBEDDINGS_FIELDS = FieldTable(
    title="POST /v1/embeddings",
    shape=EmbeddingsRequest,
    aliases=REPLICA,
    changes_nothing={**BOOKKEEPING, **CLIENT},
    not_offered={
        **PLACEMENT,
        "add_special_tokens": NotOffered(why="the tokenizer adds them", idle=(True,)),
        "truncate_prompt_tokens": NotOffered(why="a text that is too long is refused, not cut"),
    },
)


async def embeddings(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request), EMBEDDINGS_FIELDS)
    services.check_model(asked.model)
    services.check_task("embed")
    check_dimensions(services, asked.dimensions)
    prompts = _prompts(asked, services)
    key = routing_key(request, asked.routing_key)
    requests = [
        EmbedRequest(
            request_id=request_id,
            text=prompt.text if isinstance(prompt, EmbedPrompt) else prompt,
            add_special_tokens=not isinstance(prompt, EmbedPrompt),
            media=prompt.media if isinstance(prompt, EmbedPrompt) else (),
            options=RequestOptions(
                priority=asked.priority,
                routing_key=key,
                data_parallel_rank=services.replica_of(asked.data_parallel_rank),
            ),
        )
        for request_id, prompt in zip(
            request_ids(asked.rid, len(prompts), "embd"), prompts, strict=True
        )
    ]
    answers = await until_disconnect(embed_all(services, requests), request.receive)
    num_tokens = sum(answer.num_prompt_tokens for answer in answers)
    vectors = [vector_of(services, answer, asked.dimensions) for answer in answers]
    return json_response(
        msgspec.to_builtins(
            EmbeddingsResponse(
                data=[
                    Embedding(embedding=_encoded(vector, asked.encoding_format), index=index)
                    for index, vector in enumerate(vectors)
                ],
                model=services.model_name,
                usage=EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
            )
        )
    )


def _prompts(asked: EmbeddingsRequest, services: Services) -> Sequence[Text | EmbedPrompt]:
    if asked.input is None and asked.messages is None:
        raise InvalidRequest("input is required, or messages in its place", param="input")
    if asked.input is not None and asked.messages is not None:
        raise InvalidRequest("input and messages exclude each other; send one", param="input")
    if asked.messages is not None:
        media = MediaParts(services.media_markers)
        messages = [chat_message(given, i, media) for i, given in enumerate(asked.messages)]
        generates = asked.add_generation_prompt
        return [rendered(messages, media, services, add_generation_prompt=generates)]
    given = asked.input
    if isinstance(given, list) and any(isinstance(item, dict) for item in given):
        items = [item for item in given if isinstance(item, dict)]
        if len(items) != len(given):
            raise InvalidRequest(
                "input mixes objects with texts; give each text as an object with a text",
                param="input",
            )
        if len(items) > MOST_ITEMS:
            raise InvalidRequest(
                f"input has {len(items)} objects but may have {MOST_ITEMS}; send several requests",
                param="input",
            )
        return [prompt_of_item(item, f"input[{i}]", services) for i, item in enumerate(items)]
    texts, _ = texts_of(given, "input")
    return texts


def vector_of(
    services: Services, answer: PoolingOutput, dimensions: int | None
) -> NDArray[np.float32]:
    """The text's embedding, cut to `dimensions` numbers unless that is None."""
    if dimensions is None:
        return answer.values
    normalize = services.pooling is not None and services.pooling.normalize
    return shortened(answer.values, dimensions, normalize=normalize)


def _encoded(vector: NDArray[np.float32], encoding_format: str) -> list[float] | str:
    if encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    return [float(number) for number in vector.tolist()]
