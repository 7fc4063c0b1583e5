"""POST /v1/score: how likely given tokens follow a query and each of several items.

Source: the scoring API of SGLang 0.5.8.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.peer_fields import BOOKKEEPING, CLIENT, PLACEMENT, REPLICA
from sapwood.frontends.serving.embed import Text, embed_all, request_ids, usage
from sapwood.frontends.serving.scoring import scored_prompts, scores_of
from sapwood.frontends.serving.services import Services
from sapwood.http.body import read_json
from sapwood.http.errors import json_response
from sapwood.http.routing import routing_key
from sapwood.http.sse import until_disconnect
from sapwood.schema.fields import FieldTable, Int64, NotOffered, TokenId, parse
from sapwood.schema.limits import LOGPROB_TOKEN_IDS, RequestId, RoutingKey
from sapwood.schema.request import RequestOptions
from sapwood.text.embedding import EmbedRequest

Labels = Annotated[list[TokenId], msgspec.Meta(min_length=1, max_length=LOGPROB_TOKEN_IDS.most)]


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
    rid: RequestId | list[RequestId] | None = None
    priority: Int64 | None = None
    routing_key: RoutingKey = ""
    data_parallel_rank: Int64 | None = None


_NO_OVERRIDES = NotOffered(why="prompts are texts or token ids")

SCORE_FIELDS = FieldTable(
    title="POST /v1/score",
    shape=ScoreRequest,
    aliases=REPLICA,
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
    prompts = _prompts(asked, services)
    key = routing_key(request, asked.routing_key)
    requests = [
        EmbedRequest(
            request_id=request_id,
            text=prompt,
            param="items",
            label_ids=tuple(asked.label_token_ids),
            options=RequestOptions(
                priority=asked.priority,
                routing_key=key,
                data_parallel_rank=services.replica_of(asked.data_parallel_rank),
            ),
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


def _prompts(asked: ScoreRequest, services: Services) -> list[Text]:
    items = [asked.items] if isinstance(asked.items, str) else asked.items
    if not items:
        raise InvalidRequest("items is an empty list; send at least one item", param="items")
    return scored_prompts(services, asked.query, items, item_first=asked.item_first)
