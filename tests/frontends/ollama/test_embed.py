from __future__ import annotations

from dataclasses import replace

import numpy as np
import ollama
import pytest

from sapwood.frontends.server import create_app
from tests.frontends.conftest import Api, Live
from tests.frontends.pooling import EMBEDS, SIZE, PoolingEngine, classifies, over, vector_of


@pytest.fixture
def pooled(services):
    return over(services, PoolingEngine(), EMBEDS)


@pytest.fixture
def api(pooled):
    return Api(create_app(pooled))


def expected(pooled, text: str) -> np.ndarray:
    return vector_of(pooled.tokenizer.encode(text))


@pytest.mark.parametrize("given", ["oak", ["oak", "elm tree"]])
def test_a_vector_for_each_text(api, pooled, given):
    body = api.post("/api/embed", {"model": "org/tiny:latest", "input": given}).json()
    texts = [given] if isinstance(given, str) else given
    vectors = [expected(pooled, text) for text in texts]
    np.testing.assert_allclose(body["embeddings"], vectors, rtol=1e-6)
    assert body["model"] == "org/tiny:latest"
    assert body["prompt_eval_count"] == sum(map(len, texts))
    assert body["total_duration"] > 0


def test_a_shorter_vector_has_length_one_too(api, pooled):
    asked = {"input": "oak", "dimensions": 3, "truncate": True, "options": {"num_ctx": 512}}
    [vector] = api.post("/api/embed", asked).json()["embeddings"]
    kept = expected(pooled, "oak")[:3]
    np.testing.assert_allclose(vector, kept / np.linalg.norm(kept), rtol=1e-6)
    whole = api.post("/api/embed", {"input": "oak", "dimensions": 0}).json()
    assert len(whole["embeddings"][0]) == SIZE


def test_the_older_route(api, pooled):
    body = api.post("/api/embeddings", {"model": "org/tiny", "prompt": "oak"}).json()
    assert set(body) == {"embedding"}
    np.testing.assert_allclose(body["embedding"], expected(pooled, "oak"), rtol=1e-6)


def test_nothing_to_embed_only_asks_whether_the_model_is_loaded(api):
    assert api.post("/api/embed", {"input": []}).json()["embeddings"] == []
    assert api.post("/api/embeddings", {}).json() == {"embedding": []}


@pytest.mark.parametrize(
    ("path", "body", "status", "named"),
    [
        ("/api/embed", {}, 400, "input is required"),
        ("/api/embed", {"input": 5}, 400, "input"),
        ("/api/embed", {"input": ["a", ""]}, 400, "input[1] is empty"),
        ("/api/embed", {"input": "a", "dimensions": 7}, 400, "dimensions is 7"),
        ("/api/embed", {"input": "a" * 65}, 400, "65"),
        ("/api/embed", {"input": "a", "options": {"heat": 1}}, 400, "options.heat"),
        ("/api/embed", {"input": "a", "model": "llama3"}, 404, "llama3"),
        ("/api/embeddings", {"prompt": ["a"]}, 400, "prompt"),
        ("/api/embeddings", {"input": "a"}, 400, "'input'"),
    ],
)
def test_what_cannot_be_honoured_is_named(api, path, body, status, named):
    answer = api.post(path, body)
    assert answer.status_code == status
    assert named in answer.json()["error"]


@pytest.mark.parametrize("pooling", [None, classifies("good", "bad")])
def test_another_kind_of_model_says_what_to_serve(services, pooling):
    other = services if pooling is None else over(services, PoolingEngine(), pooling)
    for path, body in (("/api/embed", {"input": "a"}), ("/api/embeddings", {"prompt": "a"})):
        answer = Api(create_app(other)).post(path, body)
        assert answer.status_code == 400
        assert "embedding" in answer.json()["error"]


def test_the_official_client(pooled):
    live = Live(create_app(replace(pooled, model_name="tiny")))
    with ollama.Client(host=live.url) as client:
        answer = client.embed("tiny", ["oak", "elm"], truncate=True, dimensions=4)
        assert [len(vector) for vector in answer.embeddings] == [4, 4]
        assert len(client.embeddings("tiny", "oak").embedding) == SIZE
        assert client.show("tiny").capabilities == ["embedding"]
    live.stop()
