"""POST and PUT /encode and /classify: a model's embeddings and scores without further processing.

/encode answers with embeddings, or with the outputs of a classification head; /classify only with
the latter, before any softmax or sigmoid, for instance with the reward of a reward model.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.peer_fields import BOOKKEEPING, MEDIA, PLACEMENT, REPLICA
from sapwood.frontends.serving.embed import (
    check_dimensions,
    embed_all,
    meta_info,
    request_ids,
    texts_of,
)
from sapwood.frontends.serving.services import Services
from sapwood.http.body import read_json
from sapwood.http.errors import json_response
from sapwood.http.routing import routing_key
from sapwood.http.sse import until_disconnect
from sapwood.schema.fields import Count, FieldTable, Int64, NotOffered, TokenId, parse
from sapwood.schema.limits import RequestId, RoutingKey
from sapwood.schema.pooling import Task
from sapwood.schema.request import RequestOptions
from sapwood.text.embedding import EmbedRequest, shortened


class EncodeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Exactly one of text and input_ids must be given; a list of either is a batch.

    is_cross_encoder_request  text is a list of pairs, such as a query and a document
    dimensions                length to which embeddings are cut; default: not cut
    """

    model: str = ""
    text: str | list[str | list[str]] | None = None
    input_ids: list[TokenId | list[TokenId]] | None = None
    is_cross_encoder_request: bool = False
    dimensions: Count | None = None
    rid: RequestId | list[RequestId] | None = None
    priority: Int64 | None = None
    routing_key: RoutingKey = ""
    data_parallel_rank: Int64 | None = None


ENCODE_FIELDS = FieldTable(
    title="POST /encode",
    shape=EncodeRequest,
    aliases=REPLICA,
    changes_nothing={
        **BOOKKEEPING,
        "sampling_params": "nothing is sampled; SGLang's clients send them all the same",
    },
    not_offered={
        **PLACEMENT,
        **MEDIA,
        "input_embeds": NotOffered(why="it takes texts and token ids"),
    },
)


async def encode(request: Request, services: Services) -> Response:
    task = "embed" if services.pooling is None else services.pooling.task
    return await _answer(request, services, task)


async def classify_raw(request: Request, services: Services) -> Response:
    return await _answer(request, services, "classify")


async def _answer(request: Request, services: Services, task: Task) -> Response:
    asked = parse(await read_json(request), ENCODE_FIELDS)
    key = routing_key(request, asked.routing_key)
    answers = encoded(asked, services, task, key)
    return json_response(await until_disconnect(answers, request.receive))


async def encoded(
    asked: EncodeRequest,
    services: Services,
    task: Task,
    key: str = "",
    room: AbstractAsyncContextManager[Any] | None = None,
) -> list[dict[str, Any]] | dict[str, Any]:
    """An answer per text, or one answer if one text came alone.

    key   the routing key of all these texts
    room  as `embed_all` has it"""
    started_s = services.clock.now_s()
    services.check_model(asked.model)
    services.check_task(task)
    check_dimensions(services, asked.dimensions)
    texts, is_list, param = _texts(asked)
    requests = [
        EmbedRequest(
            request_id=request_id,
            text=text,
            param=param,
            options=RequestOptions(
                priority=asked.priority,
                routing_key=key,
                data_parallel_rank=services.replica_of(asked.data_parallel_rank),
            ),
        )
        for request_id, text in zip(
            request_ids(asked.rid, len(texts), "encode"), texts, strict=True
        )
    ]
    answers = await embed_all(services, requests, room=room)
    latency_s = services.clock.now_s() - started_s
    normalize = services.pooling is not None and services.pooling.normalize
    found: list[dict[str, Any]] = []
    for answer in answers:
        values = answer.values
        if asked.dimensions is not None:
            values = shortened(values, asked.dimensions, normalize=normalize)
        found.append(
            {"embedding": values.tolist(), "meta_info": meta_info(services, answer, latency_s)}
        )
    return found if is_list else found[0]


def _texts(asked: EncodeRequest) -> tuple[list[str | list[int] | tuple[str, str]], bool, str]:
    """(the texts, whether they came as a list, name of their field)"""
    if (asked.text is None) == (asked.input_ids is None):
        raise InvalidRequest("exactly one of text and input_ids is required", param="text")
    if asked.is_cross_encoder_request:
        return _pairs(asked.text), True, "text"
    if isinstance(asked.text, list) and any(isinstance(text, list) for text in asked.text):
        raise InvalidRequest(
            "text has pairs; set is_cross_encoder_request, or send texts", param="text"
        )
    param = "input_ids" if asked.text is None else "text"
    texts, is_list = texts_of(asked.input_ids if asked.text is None else asked.text, param)
    return [*texts], is_list, param


def _pairs(given: object) -> list[str | list[int] | tuple[str, str]]:
    pairs = given if isinstance(given, list) else []
    if not pairs or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise InvalidRequest(
            "with is_cross_encoder_request, text must be a list of pairs of texts", param="text"
        )
    return [(str(first), str(second)) for first, second in pairs]
