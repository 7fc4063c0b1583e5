from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapwood.frontends.server import create_app
from sapwood.frontends.serving.services import Services
from tests.frontends.conftest import Api
from tests.frontends.pooling import EMBEDS, PoolingEngine, classifies, over, vector_of


@pytest.fixture
def pooling_engine() -> PoolingEngine:
    return PoolingEngine()


@pytest.fixture
def api(services: Services, pooling_engine: PoolingEngine) -> Api:
    return Api(create_app(over(services, pooling_engine, EMBEDS)))


def test_one_text(api: Api, services: Services) -> None:
    body = api.post("/encode", {"text": "hello", "rid": "mine"}).json()
    want = vector_of(services.tokenizer.encode("hello"))
    np.testing.assert_allclose(body["embedding"], want, rtol=1e-6)
    info = body["meta_info"]
    assert info["id"] == "mine"
    assert info["prompt_tokens"] == 5
    assert info["completion_tokens"] == 0
    assert info["cached_tokens"] == 1
    assert info["queue_time"] == 0.25
    assert info["e2e_latency"] >= 0


def test_lists_and_the_method_put(api: Api) -> None:
    body = api.request("PUT", "/encode", json={"input_ids": [[1, 2], [3]]}).json()
    for token_ids, one in zip([[1, 2], [3]], body, strict=True):
        np.testing.assert_allclose(one["embedding"], vector_of(token_ids), rtol=1e-6)
    body = api.post("/encode", {"input_ids": [1, 2], "dimensions": 3}).json()
    assert len(body["embedding"]) == 3
    assert np.linalg.norm(body["embedding"]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "text", "exactly one of text and input_ids"),
        ({"text": "a", "input_ids": [1]}, "text", "exactly one"),
        ({"text": [["a", "b"]]}, "text", "set is_cross_encoder_request"),
        ({"text": "a", "is_cross_encoder_request": True}, "text", "a list of pairs"),
        ({"text": [["a"]], "is_cross_encoder_request": True}, "text", "a list of pairs"),
        ({"text": "a", "image_data": "x"}, "image_data", "not supported"),
        ({"text": "a", "dimensions": 9}, "dimensions", "[1, 6]"),
    ],
)
def test_what_is_refused(api: Api, body: dict[str, Any], param: str, says: str) -> None:
    answer = api.post("/encode", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert says in answer.json()["error"]["message"]


def test_a_heads_numbers_come_as_they_are(
    services: Services, pooling_engine: PoolingEngine
) -> None:
    pooling_engine.num_values = 1
    api = Api(create_app(over(services, pooling_engine, classifies("reward"))))
    for path in ("/classify", "/encode"):
        body = api.post(path, {"text": ["a", "b"]}).json()
        for text, one in zip("ab", body, strict=True):
            want = vector_of(services.tokenizer.encode(text), 1)
            np.testing.assert_allclose(one["embedding"], want, rtol=1e-6)
    pairs = {"text": [["a", "bc"]], "is_cross_encoder_request": True}
    [one] = api.post("/encode", pairs).json()
    np.testing.assert_allclose(
        one["embedding"], vector_of(services.tokenizer.encode("abc"), 1), rtol=1e-6
    )
    assert pooling_engine.submitted[-1].options.embed.num_first == 1


def test_classify_needs_a_head(api: Api, services: Services, pooling_engine: PoolingEngine) -> None:
    answer = api.post("/classify", {"text": "a"})
    assert answer.status_code == 400
    assert "has no classification head" in answer.json()["error"]["message"]
    generates = Api(create_app(over(services, pooling_engine, None)))
    for path, says in (("/encode", "--is-embedding"), ("/classify", "no classification head")):
        answer = generates.post(path, {"text": "a"})
        assert answer.status_code == 400
        assert says in answer.json()["error"]["message"]
    assert pooling_engine.submitted == []
