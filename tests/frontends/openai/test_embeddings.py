from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from sapwood.frontends.server import create_app
from sapwood.frontends.serving.services import Services
from sapwood.schema.output import Finish
from tests.frontends.conftest import Api, Live
from tests.frontends.pooling import EMBEDS, PoolingEngine, classifies, over, vector_of


@pytest.fixture
def pooling_engine() -> PoolingEngine:
    return PoolingEngine()


@pytest.fixture
def api(services: Services, pooling_engine: PoolingEngine) -> Api:
    return Api(create_app(over(services, pooling_engine, EMBEDS)))


@pytest.fixture
def live(services: Services, pooling_engine: PoolingEngine) -> Iterator[Live]:
    server = Live(create_app(over(services, pooling_engine, EMBEDS)))
    yield server
    server.stop()


def ids(text: str, services: Services) -> list[int]:
    return services.tokenizer.encode(text)


def test_one_text(api: Api, services: Services) -> None:
    answer = api.post("/v1/embeddings", {"model": "org/tiny", "input": "hello"})
    assert answer.status_code == 200
    body = answer.json()
    assert body["object"] == "list"
    assert body["model"] == "org/tiny"
    assert body["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    [one] = body["data"]
    assert (one["object"], one["index"]) == ("embedding", 0)
    np.testing.assert_allclose(one["embedding"], vector_of(ids("hello", services)), rtol=1e-6)


@pytest.mark.parametrize(
    "given", [["a", "bc", "def"], [[1], [2, 3], [4, 5, 6]], ["a", [2, 3], "def"]]
)
def test_a_list_is_answered_in_its_order(api: Api, services: Services, given: list[Any]) -> None:
    body = api.post("/v1/embeddings", {"input": given}).json()
    assert [one["index"] for one in body["data"]] == [0, 1, 2]
    for item, one in zip(given, body["data"], strict=True):
        token_ids = ids(item, services) if isinstance(item, str) else item
        np.testing.assert_allclose(one["embedding"], vector_of(token_ids), rtol=1e-6)
    assert body["usage"]["prompt_tokens"] == 6


def test_token_ids_of_one_text(api: Api) -> None:
    [one] = api.post("/v1/embeddings", {"input": [5, 6, 7]}).json()["data"]
    np.testing.assert_allclose(one["embedding"], vector_of([5, 6, 7]), rtol=1e-6)


def test_base64_and_dimensions(api: Api, services: Services) -> None:
    body = {"input": "hello", "encoding_format": "base64"}
    [one] = api.post("/v1/embeddings", body).json()["data"]
    decoded = np.frombuffer(base64.b64decode(one["embedding"]), dtype="<f4")
    np.testing.assert_array_equal(decoded, vector_of(ids("hello", services)))
    [short] = api.post("/v1/embeddings", {"input": "hello", "dimensions": 2}).json()["data"]
    np.testing.assert_allclose(
        short["embedding"], decoded[:2] / np.linalg.norm(decoded[:2]), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "input", "input is required"),
        ({"input": ""}, "input", "input is empty"),
        ({"input": []}, "input", "empty list"),
        ({"input": ["a", ""]}, "input", "input[1] is empty"),
        ({"input": [[1], []]}, "input", "input[1] is empty"),
        ({"input": [1, "a"]}, "input", "mixes token ids with texts"),
        ({"input": {"text": "a"}}, "input", "expected"),
        ({"input": "x" * 65}, "input", "65 tokens, but the context length of 64"),
        ({"input": [5, 999]}, "input", "the token id 999"),
        ({"input": "a", "dimensions": 0}, "dimensions", "must be in [1, 6]"),
        ({"input": "a", "dimensions": 7}, "dimensions", "must be in [1, 6]"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "int8"),
        ({"input": "a", "lora_path": "x"}, "lora_path", "not supported"),
        ({"input": "a", "dimension": 3}, "dimension", "did you mean 'dimensions'"),
        ({"input": ["a", "b"], "rid": ["x"]}, "rid", "1 ids but there are 2"),
    ],
)
def test_what_is_refused(
    api: Api, pooling_engine: PoolingEngine, body: dict[str, Any], param: str, says: str
) -> None:
    answer = api.post("/v1/embeddings", body)
    assert answer.status_code == 400
    assert answer.json()["param"] == param
    assert says in answer.json()["message"]
    assert pooling_engine.submitted == []


def test_another_models_name_is_404(api: Api) -> None:
    assert api.post("/v1/embeddings", {"model": "other", "input": "a"}).status_code == 404


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/generate", {"text": "hi"}),
        ("/v1/messages", {"max_tokens": 3, "messages": [{"role": "user", "content": "hi"}]}),
        ("/api/generate", {"model": "org/tiny", "prompt": "hi"}),
        ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [1]}),
    ],
)
@pytest.mark.parametrize("with_template", [True, False])
def test_an_embedding_model_does_not_generate(
    services: Services, pooling_engine: PoolingEngine, path: str, body: Any, with_template: bool
) -> None:
    from dataclasses import replace

    made = over(services, pooling_engine, EMBEDS)
    api = Api(create_app(made if with_template else replace(made, template=None)))
    answer = api.post(path, body)
    assert answer.status_code == 400
    assert "makes embeddings and generates no text" in answer.text
    assert pooling_engine.submitted == []


def test_other_models_make_no_embeddings(services: Services, pooling_engine: PoolingEngine) -> None:
    for pooling, says in (
        (None, "start the server with --is-embedding"),
        (classifies("no", "yes"), "makes no embeddings"),
    ):
        answer = Api(create_app(over(services, pooling_engine, pooling))).post(
            "/v1/embeddings", {"input": "a"}
        )
        assert answer.status_code == 400
        assert says in answer.json()["message"]


def test_health_and_model_info_know_the_model(api: Api) -> None:
    assert api.get("/health_generate").status_code == 200
    assert api.get("/model_info").json()["is_generation"] is False


def test_the_engines_errors_keep_their_status(api: Api, pooling_engine: PoolingEngine) -> None:
    pooling_engine.failure = Finish(
        kind="error", message="The request queue is full.", status=503, error_type="Unavailable"
    )
    answer = api.post("/v1/embeddings", {"input": ["a", "b"]})
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    pooling_engine.failure, pooling_engine.unavailable_reason = None, "the engine is starting"
    assert api.post("/v1/embeddings", {"input": "a"}).status_code == 503


def test_many_texts_do_not_fill_the_queue(api: Api, pooling_engine: PoolingEngine) -> None:
    body = api.post("/v1/embeddings", {"input": [[1 + i % 200] for i in range(700)]}).json()
    assert len(body["data"]) == 700
    assert pooling_engine.most_open == 256


def test_a_client_that_leaves_aborts_all_its_texts(
    live: Live,
    pooling_engine: PoolingEngine,
    until: Callable[..., None],
    leave: Callable[..., None],
) -> None:
    pooling_engine.hold = True
    body = {"input": ["a", "b", "c"]}
    leave(live.url, "/v1/embeddings", body, lambda: len(pooling_engine.open) == 3)
    until(lambda: len(pooling_engine.abandoned) == 3)
    assert pooling_engine.open == {}
    pooling_engine.hold = False
    assert httpx.post(f"{live.url}/v1/embeddings", json={"input": "a"}).status_code == 200


def test_abort_request_finds_them(
    live: Live, pooling_engine: PoolingEngine, until: Callable[..., None]
) -> None:
    pooling_engine.hold = True
    answers: list[httpx.Response] = []
    body = {"input": ["a", "b"], "rid": "mine"}
    ask = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{live.url}/v1/embeddings", json=body))
    )
    ask.start()
    until(lambda: len(pooling_engine.open) == 2)
    again = httpx.post(f"{live.url}/v1/embeddings", json={"input": "a", "rid": "mine-0"})
    assert again.status_code == 400
    assert "still open" in again.json()["message"]
    aborted = httpx.post(f"{live.url}/abort_request", json={"rid": "mine"}).json()
    assert aborted["aborted"] == ["mine-0", "mine-1"]
    ask.join()
    assert answers[0].status_code == 400
    assert "aborted" in answers[0].json()["message"]
    assert pooling_engine.open == {}


@pytest.mark.parametrize("encoding_format", [openai.omit, "float", "base64"])
def test_the_official_client(live: Live, services: Services, encoding_format: Any) -> None:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
        answer = client.embeddings.create(
            model="org/tiny",
            input=["hello", "world"],
            dimensions=4,
            encoding_format=encoding_format,
            user="me",
        )
        for text, one in zip(("hello", "world"), answer.data, strict=True):
            vector = one.embedding
            if encoding_format == "base64":
                vector = np.frombuffer(base64.b64decode(vector), dtype="<f4")
            want = vector_of(ids(text, services))[:4]
            np.testing.assert_allclose(vector, want / np.linalg.norm(want), rtol=1e-5)
        with pytest.raises(openai.BadRequestError, match="generates no text"):
            client.completions.create(model="org/tiny", prompt="x")
