"""POST /v1/classify: the label of each text, and how likely each label is."""

from __future__ import annotations

import time
import uuid

import msgspec
import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from sapwood.frontends.peer_fields import BOOKKEEPING, CLIENT, PLACEMENT, REPLICA
from sapwood.frontends.serving.embed import embed_all, request_ids, texts_of, usage
from sapwood.frontends.serving.services import Services
from sapwood.http.body import read_json
from sapwood.http.errors import json_response
from sapwood.http.routing import routing_key
from sapwood.http.sse import until_disconnect
from sapwood.schema.fields import FieldTable, Int64, TokenId, parse
from sapwood.schema.limits import RequestId, RoutingKey
from sapwood.schema.pooling import Pooling
from sapwood.schema.request import RequestOptions
from sapwood.text.embedding import EmbedRequest, sigmoid, softmax


class ClassifyRequest(msgspec.Struct, frozen=True, kw_only=True):
    """input: a text, one text's token ids, or a list of either."""

    input: str | list[str | TokenId | list[TokenId]]
    model: str = ""
    rid: RequestId | list[RequestId] | None = None
    priority: Int64 | None = None
    routing_key: RoutingKey = ""
    data_parallel_rank: Int64 | None = None


CLASSIFY_FIELDS = FieldTable(
    title="POST /v1/classify",
    shape=ClassifyRequest,
    aliases=REPLICA,
    changes_nothing={**BOOKKEEPING, **CLIENT},
    not_offered=PLACEMENT,
)


async def classify(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request), CLASSIFY_FIELDS)
    services.check_model(asked.model)
    services.check_task("classify")
    pooling = services.pooling
    assert pooling is not None, "a model that classifies has a pooling"
    texts, _ = texts_of(asked.input, "input")
    key = routing_key(request, asked.routing_key)
    requests = [
        EmbedRequest(
            request_id=request_id,
            text=text,
            options=RequestOptions(
                priority=asked.priority,
                routing_key=key,
                data_parallel_rank=services.replica_of(asked.data_parallel_rank),
            ),
        )
        for request_id, text in zip(
            request_ids(asked.rid, len(texts), "classify"), texts, strict=True
        )
    ]
    answers = await until_disconnect(embed_all(services, requests), request.receive)
    data = []
    for index, answer in enumerate(answers):
        likely = probabilities(answer.values, pooling)
        data.append(
            {
                "index": index,
                "label": pooling.labels[int(answer.values.argmax())],
                "probs": likely.tolist(),
                "num_classes": len(pooling.labels),
            }
        )
    return json_response(
        {
            "id": f"classify-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": services.model_name,
            "data": data,
            "usage": usage(answers),
        }
    )


def probabilities(values: NDArray[np.float32], pooling: Pooling) -> NDArray[np.float32]:
    """[labels] probabilities.

    They sum to 1, unless a text may have several labels or the model knows only one label; then
    each probability stands for itself.
    """
    is_apart = pooling.multi_label or len(pooling.labels) == 1
    return sigmoid(values) if is_apart else softmax(values)
