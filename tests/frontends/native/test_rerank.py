from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tokenizers

from sapwood.frontends.server import create_app
from sapwood.frontends.serving.services import Services
from sapwood.text.tokenizer import Tokenizer
from tests.frontends.conftest import EOS, Api
from tests.frontends.pooling import (
    EMBEDS,
    PoolingEngine,
    classifies,
    logprob_of,
    over,
    vector_of,
)

BODY: dict[str, Any] = {"query": "q?", "documents": ["one", "two two", "three"]}


@pytest.fixture
def pooling_engine() -> PoolingEngine:
    return PoolingEngine(num_values=1)


@pytest.fixture
def cross_encoder(services: Services, pooling_engine: PoolingEngine) -> Callable[..., Api]:
    return lambda **fields: Api(
        create_app(over(services, pooling_engine, classifies("relevant", **fields)))
    )


def value(services: Services, document: str) -> float:
    return float(vector_of(services.tokenizer.encode("q?" + document), 1)[0])


@pytest.mark.parametrize("squashes", [True, False])
def test_a_cross_encoder_sorts_by_what_it_says_of_the_pairs(
    cross_encoder: Callable[..., Api],
    services: Services,
    pooling_engine: PoolingEngine,
    squashes: bool,
) -> None:
    answer = cross_encoder(squashes=squashes).post("/v1/rerank", BODY).json()
    assert len(answer) == 3
    scores = [one["score"] for one in answer]
    assert scores == sorted(scores, reverse=True)
    for one in answer:
        document = BODY["documents"][one["index"]]
        assert one["document"] == document
        said = value(services, document)
        want = 1 / (1 + np.exp(-said)) if squashes else said
        assert one["score"] == pytest.approx(want, rel=1e-5)
        assert one["meta_info"]["prompt_tokens"] == 2 + len(document)
    assert all(one.options.embed.num_first == 2 for one in pooling_engine.submitted)


def test_as_many_as_wanted_and_without_their_texts(cross_encoder: Callable[..., Api]) -> None:
    body = BODY | {"top_n": 2, "return_documents": False}
    answer = cross_encoder().request("PUT", "/v1/rerank", json=body).json()
    assert len(answer) == 2
    assert all("document" not in one for one in answer)
    assert len(cross_encoder().post("/v1/rerank", BODY | {"top_n": 9}).json()) == 3


def word_tokenizer() -> Tokenizer:
    """Bytes, and the words yes and no as one token each."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = ["ye", "yes", "no"]
    merges = [("y", "e"), ("ye", "s"), ("n", "o")]
    vocab = {token: i for i, token in enumerate([*alphabet, *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", EOS])
    return Tokenizer(backend, special_tokens={"eos_token": EOS})


def test_a_model_that_generates_is_asked_for_a_judgement(
    services: Services, pooling_engine: PoolingEngine
) -> None:
    words = word_tokenizer()
    yes, no = words.encode("yes")[0], words.encode("no")[0]
    engine = replace_context(pooling_engine, 1024)
    made = over(replace(services, tokenizer=words), engine, None)
    answer = Api(create_app(made)).post("/v1/rerank", BODY | {"instruct": "Find it"}).json()
    prompts = [words.decode(one.prompt_ids, skip_special_tokens=False) for one in engine.submitted]
    for document, prompt in zip(BODY["documents"], prompts, strict=True):
        assert 'answer can only be "yes" or "no"' in prompt
        assert f"<Instruct>: Find it\n<Query>: q?\n<Document>: {document}" in prompt
        assert prompt.endswith("<|im_start|>assistant\n")
    for one in answer:
        token_ids = engine.submitted[one["index"]].prompt_ids
        odds = np.exp([logprob_of(token_ids, label) for label in (yes, no)])
        assert one["score"] == pytest.approx(odds[0] / odds.sum(), rel=1e-5)
    assert [one["score"] for one in answer] == sorted((a["score"] for a in answer), reverse=True)


def replace_context(engine: PoolingEngine, length: int) -> PoolingEngine:
    class Longer(PoolingEngine):
        @property
        def info(self) -> Any:
            import msgspec

            return msgspec.structs.replace(super().info, context_length=length)

    return Longer(num_values=engine.num_values)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"query": " "}, "query is empty"),
        ({"documents": []}, "documents"),
        ({"documents": ["a", ""]}, "documents[1] is empty"),
        ({"documents": [{"text": "a"}]}, "documents[0]"),
        ({"top_n": 0}, "top_n"),
        ({"instruct": "x"}, "instruct is for models that generate"),
    ],
)
def test_what_is_refused(
    cross_encoder: Callable[..., Api],
    pooling_engine: PoolingEngine,
    change: dict[str, Any],
    says: str,
) -> None:
    answer = cross_encoder().post("/v1/rerank", BODY | change)
    assert answer.status_code == 400
    assert says in answer.json()["message"]
    assert pooling_engine.submitted == []


def test_models_that_cannot_rank(services: Services, pooling_engine: PoolingEngine) -> None:
    for pooling, changes, says in (
        (EMBEDS, {}, "has no classification head"),
        (classifies("a", "b"), {}, "has 2 labels, and a reranker has one"),
        (None, {}, "writes 'yes' in 3 tokens"),
        (None, {"template": None}, "has no chat template"),
    ):
        made = replace(over(services, pooling_engine, pooling), **changes)
        answer = Api(create_app(made)).post("/v1/rerank", BODY)
        assert answer.status_code == 400
        assert says in answer.json()["message"]
    assert pooling_engine.submitted == []
