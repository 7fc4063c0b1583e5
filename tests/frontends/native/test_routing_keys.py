"""The routing key of requests for numbers: a field of the body, or a gateway's header."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sapwood.frontends.server import create_app
from sapwood.frontends.serving.services import Services
from sapwood.schema.pooling import Pooling
from tests.frontends.conftest import Api
from tests.frontends.native.test_rerank import replace_context, word_tokenizer
from tests.frontends.pooling import EMBEDS, PoolingEngine, classifies, over

PAIR = classifies("relevant")


@pytest.mark.parametrize(
    ("path", "pooling", "body"),
    [
        ("/encode", EMBEDS, {"text": ["a", "b"]}),
        ("/classify", PAIR, {"text": ["a", "b"]}),
        ("/v1/embeddings", EMBEDS, {"input": ["a", "b"]}),
        ("/v1/classify", PAIR, {"input": ["a", "b"]}),
        ("/v1/score", None, {"query": "q", "items": ["a", "b"], "label_token_ids": [1, 2]}),
        ("/v1/rerank", PAIR, {"query": "q", "documents": ["a", "b"]}),
        ("/v1/rerank", None, {"query": "q", "documents": ["a", "b"]}),
    ],
)
def test_each_text_has_the_key_of_its_call(
    services: Services, path: str, pooling: Pooling | None, body: dict[str, Any]
) -> None:
    size = EMBEDS.size if pooling is EMBEDS else 1
    engine = replace_context(PoolingEngine(num_values=size), 1024)
    api = Api(create_app(over(replace(services, tokenizer=word_tokenizer()), engine, pooling)))
    header = {"x-smg-routing-key": "theirs"}
    for more, headers, expected in (
        ({"routing_key": "mine"}, {}, "mine"),
        ({}, header, "theirs"),
        ({"routing_key": "mine"}, header, "mine"),
        ({}, {}, ""),
    ):
        engine.submitted.clear()
        answer = api.request("POST", path, json=body | more, headers=headers)
        assert answer.status_code == 200, answer.text
        assert [one.options.routing_key for one in engine.submitted] == [expected] * 2
    assert api.post(path, body | {"routing_key": 3}).status_code == 400
