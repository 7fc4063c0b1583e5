"""The official client against a server of a real embedding model, and of a tiny reranker."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from sapwood.store import ModelFiles
from tests.e2e.server import Server, serving
from tests.tiny import save_pooled

TEXTS = [
    "A cat sits on the mat.",
    "A kitten rests on a rug.",
    "Paris is the capital of France. " * 20,
    "Schöne Grüße aus Zürich, 你好",
    "x",
]


@pytest.fixture(scope="module")
def minilm(minilm_files: ModelFiles) -> Iterator[Server]:
    with serving("--model", minilm_files.name, "--max-queued-requests", "300") as one:
        yield one


@pytest.fixture(scope="module")
def expected(minilm_files: ModelFiles) -> np.ndarray:
    """What sentence-transformers computes: the mean of the hidden states, scaled to length 1."""
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(minilm_files.path)
    model = BertModel.from_pretrained(minilm_files.path).eval()
    vectors = []
    with torch.inference_mode():
        for text in TEXTS:
            ids = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            mean = model(**ids).last_hidden_state[0].mean(0)
            vectors.append(torch.nn.functional.normalize(mean, dim=0).numpy())
    return np.stack(vectors)


def until(condition: Callable[[], bool], otherwise: str, limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, otherwise
        time.sleep(0.02)


def assert_idle(server: Server) -> None:
    counters = server.wait_until_idle()
    assert counters["num_leased_pages"] == 0
    assert counters["num_free_pages"] == counters["num_pages"]


def test_the_vectors_are_those_of_sentence_transformers(
    minilm: Server, expected: np.ndarray
) -> None:
    with openai.OpenAI(base_url=f"{minilm.url}/v1", api_key="none") as client:
        answer = client.embeddings.create(model="all-minilm-l6-v2", input=TEXTS)
        got = np.array([one.embedding for one in answer.data])
        np.testing.assert_allclose(got, expected, atol=2e-6)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
        alone = client.embeddings.create(
            model="all-minilm-l6-v2", input=TEXTS[0], encoding_format="float"
        )
        np.testing.assert_allclose(alone.data[0].embedding, expected[0], atol=2e-6)
        short = client.embeddings.create(model="all-minilm-l6-v2", input=TEXTS[0], dimensions=64)
        want = expected[0][:64] / np.linalg.norm(expected[0][:64])
        np.testing.assert_allclose(short.data[0].embedding, want, atol=2e-6)
    assert got[0] @ got[1] > 0.6 > 0.2 > got[0] @ got[2]
    native = httpx.post(f"{minilm.url}/encode", json={"text": TEXTS[0]}).json()
    np.testing.assert_allclose(native["embedding"], expected[0], atol=2e-6)
    assert_idle(minilm)


def test_a_text_beyond_the_context_is_refused(minilm: Server) -> None:
    answer = httpx.post(f"{minilm.url}/v1/embeddings", json={"input": "word " * 300})
    assert answer.status_code == 400
    assert "302 tokens, but the context length of 256" in answer.json()["message"]


def test_it_does_not_chat(minilm: Server) -> None:
    with (
        openai.OpenAI(base_url=f"{minilm.url}/v1", api_key="none") as client,
        pytest.raises(openai.BadRequestError, match="generates no text"),
    ):
        client.chat.completions.create(
            model="all-minilm-l6-v2", messages=[{"role": "user", "content": "hi"}]
        )
    assert httpx.get(f"{minilm.url}/health_generate").status_code == 200
    info = httpx.get(f"{minilm.url}/model_info").json()
    assert info["is_generation"] is False


def test_clients_that_leave_leave_nothing_behind(minilm: Server) -> None:
    body = {"input": [[1000 + i % 5000] * 250 for i in range(2000)]}

    before = minilm.counters()
    clients = [
        http.client.HTTPConnection(minilm.url.removeprefix("http://"), timeout=60) for _ in range(2)
    ]
    for client in clients:
        client.request("POST", "/v1/embeddings", json.dumps(body))
    until(lambda: minilm.counters()["num_arrived"] > before["num_arrived"], "nothing has arrived")
    for client in clients:
        client.close()
    until(lambda: minilm.counters()["num_aborted"] > before["num_aborted"], "nothing was aborted")
    assert_idle(minilm)
    answer = httpx.post(f"{minilm.url}/v1/embeddings", json={"input": "still here"}, timeout=60)
    assert answer.status_code == 200


def test_a_full_queue_refuses(minilm: Server) -> None:
    """Four calls of 256 open texts at a time are more than 300 waiting ones."""
    body = {"input": [[1000 + i] * 60 for i in range(256)]}
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{minilm.url}/v1/embeddings", json=body, timeout=120))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = sorted(answer.status_code for answer in answers)
    assert set(statuses) == {200, 503}
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert "queue is full" in refused.json()["message"]
    assert_idle(minilm)


def test_a_tiny_reranker(tmp_path: Path) -> None:
    model = save_pooled(tmp_path, "BertForSequenceClassification", num_labels=1)
    body: dict[str, Any] = {"query": "cats", "documents": ["dogs", "kittens", "a cat"]}
    with serving("--model", str(tmp_path), "--dtype", "float32") as server:
        ranked = httpx.post(f"{server.url}/v1/rerank", json=body).json()
        [one] = httpx.post(f"{server.url}/v1/classify", json={"input": "cats"}).json()["data"]
        refused = httpx.post(f"{server.url}/v1/embeddings", json={"input": "cats"})
        assert_idle(server)
    assert refused.status_code == 400
    assert one["label"] == "LABEL_0"
    assert [answer["score"] for answer in ranked] == sorted(
        (answer["score"] for answer in ranked), reverse=True
    )
    for answer in ranked:
        assert answer["score"] == pytest.approx(relevance(tmp_path, model, answer), abs=1e-4)


def relevance(directory: Path, model: Any, answer: dict[str, Any]) -> float:
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    query, document = (backend.encode(text).ids for text in ("cats", answer["document"]))
    types = torch.tensor([[0] * len(query) + [1] * len(document)])
    with torch.inference_mode():
        logits = model(torch.tensor([query + document]), token_type_ids=types).logits
    return float(logits.sigmoid())
