"""POST and PUT /v1/rerank: documents by their relevance to a query, the most relevant first.

With a cross-encoder (one label) the score is the output of its head for the pair. A model that
generates is asked for a judgement in its own chat format; the score is the probability of "yes"
among "yes" and "no".

Source: the rerank API of SGLang 0.5.8. The question is Qwen3-Reranker's (Zhang et al. 2025,
arXiv:2506.05176); other models can answer it as far as they understand it.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.frontends.openai.parts import chat_part
from sapwood.frontends.peer_fields import (
    BOOKKEEPING,
    CLIENT,
    GENERATION,
    PLACEMENT,
    REPLICA,
    ROUTED_EXPERTS,
)
from sapwood.frontends.serving.embed import embed_all, meta_info, request_ids
from sapwood.frontends.serving.embed_prompts import EmbedPrompt, rendered
from sapwood.frontends.serving.media import MediaParts, content_of
from sapwood.frontends.serving.services import Services
from sapwood.http.body import read_json
from sapwood.http.errors import json_response
from sapwood.http.routing import routing_key
from sapwood.http.sse import until_disconnect
from sapwood.schema.fields import Alias, FieldTable, Int64, parse
from sapwood.schema.limits import RequestId, RoutingKey
from sapwood.schema.request import RequestOptions
from sapwood.schema.unsupported import refuse
from sapwood.text.embedding import EmbedRequest, sigmoid, softmax
from sapwood.text.template import ChatTemplate

DEFAULT_INSTRUCT = "Given a web search query, retrieve relevant passages that answer the query"
SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".'
)

Content = str | list[dict[str, Any]]
"""A text, or parts of the types text, image_url and video_url."""

Documents = Annotated[list[Content], msgspec.Meta(min_length=1)]
TopN = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


class RerankRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST or PUT /v1/rerank.

    instruct          for models that generate: what makes a document relevant
    top_n             number of documents in the answer at most; default: all
    return_documents  whether the answer repeats the documents
    """

    query: Content
    documents: Documents
    instruct: str | None = None
    top_n: TopN | None = None
    return_documents: bool = True
    model: str = ""
    rid: RequestId | list[RequestId] | None = None
    priority: Int64 | None = None
    routing_key: RoutingKey = ""
    data_parallel_rank: Int64 | None = None


RERANK_FIELDS = FieldTable(
    title="POST /v1/rerank",
    shape=RerankRequest,
    aliases={"top_k": Alias(of="top_n"), **REPLICA},
    changes_nothing={**BOOKKEEPING, **CLIENT},
    not_offered={**PLACEMENT, **GENERATION, **ROUTED_EXPERTS},
)


async def rerank(request: Request, services: Services) -> Response:
    started_s = services.clock.now_s()
    asked = parse(await read_json(request), RERANK_FIELDS)
    services.check_model(asked.model)
    _check_not_empty(asked)
    ids = request_ids(asked.rid, len(asked.documents), "rerank")
    key = routing_key(request, asked.routing_key)
    is_decoder = services.pooling is None
    requests = (_judgements if is_decoder else _pairs)(asked, services, ids, key)
    answers = await until_disconnect(embed_all(services, requests), request.receive)
    latency_s = services.clock.now_s() - started_s
    found: list[dict[str, Any]] = []
    for index, answer in enumerate(answers):
        squashes = services.pooling is not None and services.pooling.squashes
        values = softmax(answer.values) if is_decoder else answer.values
        ranked: dict[str, Any] = {
            "score": float(sigmoid(values)[0] if squashes else values[0]),
            "index": index,
            "meta_info": meta_info(services, answer, latency_s),
        }
        if asked.return_documents:
            ranked["document"] = asked.documents[index]
        found.append(ranked)
    found.sort(key=lambda ranked: -ranked["score"])
    return json_response(found[: asked.top_n])


def _check_not_empty(asked: RerankRequest) -> None:
    if _is_empty(asked.query):
        raise InvalidRequest("query is empty; say what is looked for", param="query")
    for index, document in enumerate(asked.documents):
        if _is_empty(document):
            raise InvalidRequest(f"documents[{index}] is empty; leave it out", param="documents")


def _is_empty(content: Content) -> bool:
    return not (content.strip() if isinstance(content, str) else content)


def _pairs(
    asked: RerankRequest, services: Services, ids: list[str], key: str
) -> list[EmbedRequest]:
    """The requests to a cross-encoder: a pair of query and document each."""
    services.check_task("classify")
    assert services.pooling is not None
    num_labels = len(services.pooling.labels)
    if num_labels != 1:
        raise UnsupportedFeature(
            f"this server's model has {num_labels} labels, and a reranker has one; use /v1/classify"
        )
    if asked.instruct is not None:
        refuse(
            UnsupportedFeature(
                "instruct is for models that generate, and this server's is a cross-encoder; "
                "leave it out",
                param="instruct",
            )
        )
    query = _text_alone(asked.query, "query")
    documents = [_text_alone(one, f"documents[{i}]") for i, one in enumerate(asked.documents)]
    return [
        EmbedRequest(
            request_id=request_id,
            text=(query, document),
            param="documents",
            options=RequestOptions(
                priority=asked.priority,
                routing_key=key,
                data_parallel_rank=services.replica_of(asked.data_parallel_rank),
            ),
        )
        for request_id, document in zip(ids, documents, strict=True)
    ]


def _text_alone(content: Content, where: str) -> str:
    if isinstance(content, str):
        return content
    raise UnsupportedFeature(
        f"{where} has parts, but this server's model is a cross-encoder, which reads texts; send "
        "a text, or serve a model that sees",
        param=where,
    )


def _judgements(
    asked: RerankRequest, services: Services, ids: list[str], key: str
) -> list[EmbedRequest]:
    """The requests to a model that generates: a question about each document."""
    template = services.template
    if template is None:
        raise UnsupportedFeature(
            "this model has no chat template to ask it for a judgement with; use /v1/score with a "
            "prompt of your own, or start the server with --chat-template"
        )
    labels = tuple(_only_token(services, word) for word in ("yes", "no"))
    requests = []
    for index, (request_id, document) in enumerate(zip(ids, asked.documents, strict=True)):
        prompt = _question(asked, index, document, template, services)
        requests.append(
            EmbedRequest(
                request_id=request_id,
                text=prompt.text,
                media=prompt.media,
                # The template writes them.
                add_special_tokens=False,
                param="documents",
                label_ids=labels,
                options=RequestOptions(
                    priority=asked.priority,
                    routing_key=key,
                    data_parallel_rank=services.replica_of(asked.data_parallel_rank),
                ),
            )
        )
    return requests


def _question(
    asked: RerankRequest,
    index: int,
    document: Content,
    template: ChatTemplate,
    services: Services,
) -> EmbedPrompt:
    """Whether the document meets the query: in the model's own words if its template takes a query
    and a document, as Qwen3-VL-Reranker's does, else in those of Qwen3-Reranker."""
    media = MediaParts(services.media_markers)
    query = _parts(asked.query, "query", media)
    shown = _parts(document, f"documents[{index}]", media)
    # Thinking is turned off: the first token has to be the answer.
    options: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": False}
    if {"query", "document"} <= template.variables:
        if asked.instruct is not None:
            options["instruct"] = asked.instruct
        both: list[dict[str, Any]] = [{"role": "user", "content": one} for one in (query, shown)]
        return rendered(both, media, services, query=query, document=shown, **options)
    instruct = asked.instruct or DEFAULT_INSTRUCT
    pieces = [
        f"<Instruct>: {instruct}\n<Query>: ",
        *(part["text"] if part["type"] == "text" else part for part in query),
        "\n<Document>: ",
        *(part["text"] if part["type"] == "text" else part for part in shown),
    ]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": content_of(pieces, joined_by="")},
    ]
    return rendered(messages, media, services, **options)


def _parts(content: Content, where: str, media: MediaParts) -> list[dict[str, str]]:
    """The content in the form of chat templates; `media` takes what it shows."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [chat_part(part, f"{where}[{i}]", media) for i, part in enumerate(content)]


def _only_token(services: Services, word: str) -> int:
    token_ids = services.tokenizer.encode(word, False)
    if len(token_ids) != 1:
        raise UnsupportedFeature(
            f"this model writes {word!r} in {len(token_ids)} tokens, so that it cannot be scored; "
            "use /v1/score with labels of your own"
        )
    return token_ids[0]
