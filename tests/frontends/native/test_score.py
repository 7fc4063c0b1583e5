from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapwood.frontends.server import create_app
from sapwood.frontends.serving.services import Services
from tests.frontends.conftest import Api
from tests.frontends.pooling import EMBEDS, PoolingEngine, logprob_of, over


@pytest.fixture
def pooling_engine() -> PoolingEngine:
    return PoolingEngine()


@pytest.fixture
def api(services: Services, pooling_engine: PoolingEngine) -> Api:
    return Api(create_app(over(services, pooling_engine, None)))


@pytest.mark.parametrize("item_first", [False, True])
@pytest.mark.parametrize("apply_softmax", [False, True])
def test_scores_follow_the_items(
    api: Api, services: Services, item_first: bool, apply_softmax: bool
) -> None:
    body = {
        "model": "org/tiny",
        "query": "Is it? ",
        "items": ["yes it is", "no"],
        "label_token_ids": [5, 9, 70],
        "item_first": item_first,
        "apply_softmax": apply_softmax,
    }
    answer = api.post("/v1/score", body).json()
    assert answer["object"] == "scoring"
    assert answer["model"] == "org/tiny"
    for item, scores in zip(body["items"], answer["scores"], strict=True):
        prompt = item + "Is it? " if item_first else "Is it? " + item
        token_ids = services.tokenizer.encode(prompt)
        likely = np.exp([logprob_of(token_ids, label) for label in (5, 9, 70)])
        want = likely / likely.sum() if apply_softmax else likely
        np.testing.assert_allclose(scores, want, rtol=1e-5)
    assert answer["usage"]["prompt_tokens"] == 7 * 2 + 9 + 2


def test_token_ids_and_a_single_item(api: Api, pooling_engine: PoolingEngine) -> None:
    body: dict[str, Any] = {"query": [1, 2], "items": [[3], [4, 5]], "label_token_ids": [7]}
    assert api.post("/v1/score", body).status_code == 200
    assert [one.prompt_ids for one in pooling_engine.submitted] == [[1, 2, 3], [1, 2, 4, 5]]
    assert all(one.options.sampling.max_new_tokens == 1 for one in pooling_engine.submitted)
    answer = api.post("/v1/score", {"query": "a", "items": "b", "label_token_ids": [7]})
    assert len(answer.json()["scores"]) == 1


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"query": None}, "query", "required"),
        ({"items": []}, "items", "empty list"),
        ({"label_token_ids": []}, "label_token_ids", "length"),
        ({"label_token_ids": [999]}, "label_token_ids", "the token id 999"),
        ({"items": [[1]]}, "items", "all be texts, or all be lists"),
        ({"query": "", "items": [""]}, "items", "no tokens"),
        ({"query": "x" * 64}, "items", "65 tokens, but the context length of 64"),
        ({"return_pooled_hidden_states": True}, "return_pooled_hidden_states", "not supported"),
    ],
)
def test_what_is_refused(
    api: Api, pooling_engine: PoolingEngine, change: dict[str, Any], param: str, says: str
) -> None:
    body = {"query": "a", "items": ["b"], "label_token_ids": [1]} | change
    answer = api.post("/v1/score", body)
    assert answer.status_code == 400
    assert answer.json()["param"] == param
    assert says in answer.json()["message"]
    assert pooling_engine.submitted == []


def test_an_embedding_model_scores_nothing(
    services: Services, pooling_engine: PoolingEngine
) -> None:
    api = Api(create_app(over(services, pooling_engine, EMBEDS)))
    answer = api.post("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [1]})
    assert answer.status_code == 400
    assert "generates no text" in answer.json()["message"]
