"""POST /v1/score: how likely given tokens follow a query and each of several items.

Source: the scoring API of SGLang 0.5.8.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.common.body import read_json
from sapwood.frontends.common.embed import Text, embed_all, request_ids, usage
from sapwood.frontends.common.errors import json_response
from sapwood.frontends.common.fields import FieldTable, Int64, NotOffered, TokenId, parse
from sapwood.frontends.common.peer_fields import BOOKKEEPING, CLIENT, PLACEMENT
from sapwood.frontends.common.routing import routing_key
from sapwood.frontends.common.services import Services
from sapwood.frontends.common.sse import until_disconnect
from sapwood.schema.logprobs import MAX_TOKEN_IDS
from sapwood.schema.request import RequestOptions
from sapwood.text.embedding import EmbedRequest, PoolingOutput, softmax

Labels = Annotated[list[TokenId], msgspec.Meta(min_length=1, max_length=MAX_TOKEN_IDS)]


class ScoreRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/score. A prompt is the query followed by one item; all are texts, or all token ids.

    label_token_ids  tokens whose probabilities of coming next are the scores
    apply_softmax    probabilities among the labels only, which sum to 1; else among all tokens
    item_first       the item comes before the query
    """

    query: str | list[TokenId]
    items: str | list[str | list[TokenId]]
    label_token_ids: Labels
    apply_softmax: bool = False
    item_first: bool = False
    model: str = ""
    rid: str | list[str] | None = None
    priority: Int64 | None = None
    routing_key: str = ""


_NO_OVERRIDES = NotOffered(why="prompts are texts or token ids")

SCORE_FIELDS = FieldTable(
    title="POST /v1/score",
    shape=ScoreRequest,
    changes_nothing={**BOOKKEEPING, **CLIENT},
    not_offered={
        **PLACEMENT,
        "return_pooled_hidden_states": NotOffered(why="the answer has scores only"),
        "embed_override_token_id": _NO_OVERRIDES,
        "query_embed_overrides": _NO_OVERRIDES,
        "item_embed_overrides": _NO_OVERRIDES,
    },
)


async def score(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request), SCORE_FIELDS)
    services.check_model(asked.model)
    services.check_task("tokens")
    prompts = _prompts(asked)
    key = routing_key(request, asked.routing_key)
    requests = [
        EmbedRequest(
            request_id=request_id,
            text=prompt,
            param="items",
            label_ids=tuple(asked.label_token_ids),
            options=RequestOptions(priority=asked.priority, routing_key=key),
        )
        for request_id, prompt in zip(
            request_ids(asked.rid, len(prompts), "score"), prompts, strict=True
        )
    ]
    answers = await until_disconnect(embed_all(services, requests), request.receive)
    return json_response(
        {
            "scores": [scores_of(answer, apply_softmax=asked.apply_softmax) for answer in answers],
            "model": services.model_name,
            "usage": usage(answers),
            "object": "scoring",
        }
    )


def scores_of(answer: PoolingOutput, *, apply_softmax: bool) -> list[float]:
    """Log probabilities of the labels -> their probabilities, in the same order."""
    likely = softmax(answer.values) if apply_softmax else np.exp(answer.values)
    return [float(probability) for probability in likely.tolist()]


def _prompts(asked: ScoreRequest) -> list[Text]:
    items = [asked.items] if isinstance(asked.items, str) else asked.items
    if not items:
        raise InvalidRequest("items is an empty list; send at least one item", param="items")
    return [joined(asked.query, item, item_first=asked.item_first) for item in items]


def joined(query: Text, item: Text, *, item_first: bool) -> Text:
    """The prompt of one item; InvalidRequest if one is a text and the other token ids."""
    if isinstance(query, str) and isinstance(item, str):
        return item + query if item_first else query + item
    if isinstance(query, list) and isinstance(item, list):
        return item + query if item_first else query + item
    raise InvalidRequest(
        "query and items must all be texts, or all be lists of token ids", param="items"
    )
