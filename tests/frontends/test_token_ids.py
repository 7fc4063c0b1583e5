"""Token ids that the model does not know reach no engine, whichever field brings them."""

from __future__ import annotations

from typing import Any

import pytest

from sapwood.frontends.native.protocol import NativeSampling
from sapwood.frontends.server import create_app, inner_app
from sapwood.frontends.serving.services import Services
from sapwood.schema.pooling import Pooling
from tests.frontends.conftest import Api
from tests.frontends.pooling import EMBEDS, PoolingEngine, classifies, over

UNKNOWN = 99_999
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
SCORE: dict[str, Any] = {"query": [1], "items": [[2]], "label_token_ids": [3]}
SAMPLED = {"text": "a", "return_logprob": True}
CLASSES = classifies("yes", "no")
DISALLOWED: dict[str, Any] = {"custom_logit_processor": "disallowed_tokens"}

CASES: list[tuple[str, Pooling | None, dict[str, Any], str]] = [
    ("/generate", None, {"input_ids": [1, UNKNOWN]}, "GenerateRequest.input_ids"),
    ("/generate", None, {"input_ids": [[1], [UNKNOWN]]}, "GenerateRequest.input_ids"),
    (
        "/generate",
        None,
        SAMPLED | {"token_ids_logprob": [1, UNKNOWN]},
        "GenerateRequest.token_ids_logprob",
    ),
    *(
        ("/generate", None, {"text": "a", "sampling_params": params}, f"NativeSampling.{name}")
        for name, params in (
            ("logit_bias", {"logit_bias": {str(UNKNOWN): 1}}),
            ("stop_token_ids", {"stop_token_ids": [1, UNKNOWN]}),
            ("allowed_token_ids", {"allowed_token_ids": [1, UNKNOWN]}),
        )
    ),
    *(
        (
            "/generate",
            None,
            {"text": "a", **DISALLOWED, "sampling_params": {"custom_params": {"token_ids": ids}}},
            "NativeSampling.custom_params",
        )
        for ids in ([1, UNKNOWN], [-1], [2**40], [10**30], "x", [True], [], [1] * 300)
    ),
    *(
        (path, None, base | fields, f"{kind}.{name}")
        for path, base, kind in (
            ("/v1/chat/completions", CHAT, "ChatRequest"),
            ("/v1/completions", {"prompt": "a"}, "CompletionRequest"),
        )
        for name, fields in (
            ("logit_bias", {"logit_bias": {str(UNKNOWN): 1}}),
            ("stop_token_ids", {"stop_token_ids": [1, UNKNOWN]}),
            ("stop_token_ids", {"stop_token_ids": [1] * 300}),
            ("allowed_token_ids", {"allowed_token_ids": [1, UNKNOWN]}),
            ("custom_params", DISALLOWED | {"custom_params": {"token_ids": [-1]}}),
        )
    ),
    (
        "/v1/responses",
        None,
        {"input": "a", "logit_bias": {str(UNKNOWN): 1}},
        "ResponsesRequest.logit_bias",
    ),
    ("/v1/completions", None, {"prompt": [1, UNKNOWN]}, "CompletionRequest.prompt"),
    ("/v1/score", None, SCORE | {"label_token_ids": [UNKNOWN]}, "ScoreRequest.label_token_ids"),
    ("/v1/score", None, SCORE | {"query": [UNKNOWN]}, "ScoreRequest.query"),
    ("/v1/score", None, SCORE | {"items": [[UNKNOWN]]}, "ScoreRequest.items"),
    ("/detokenize", None, {"tokens": [UNKNOWN]}, "DetokenizeRequest.tokens"),
    ("/v1/embeddings", EMBEDS, {"input": [1, UNKNOWN]}, "EmbeddingsRequest.input"),
    ("/encode", EMBEDS, {"input_ids": [[UNKNOWN]]}, "EncodeRequest.input_ids"),
    ("/v1/classify", CLASSES, {"input": [UNKNOWN]}, "ClassifyRequest.input"),
]


@pytest.mark.parametrize(("path", "pooling", "body", "field"), CASES)
def test_a_token_id_that_the_model_does_not_know_is_refused(
    services: Services, path: str, pooling: Pooling | None, body: dict[str, Any], field: str
) -> None:
    engine = PoolingEngine()
    api = Api(create_app(over(services, engine, pooling)))
    response = api.post(path, body)
    assert response.status_code == 400, response.text
    error = response.json().get("error", response.json())
    name = field.partition(".")[2]
    # Both the query and the items of /v1/score are one prompt.
    assert error["param"].rpartition(".")[2] in (name, "prompt", "items")
    assert all(max(one.prompt_ids) < UNKNOWN for one in engine.submitted), "the rest of a batch"


def fields_with_token_ids(services: Services) -> set[str]:
    """The fields that say `TokenId` in the bodies that the server takes."""
    taken = {endpoint.body for endpoint in inner_app(services).state.endpoints}
    return {
        f"{body.__name__}.{name}"
        for body in (*taken - {None}, NativeSampling)
        for base in body.__mro__[:-1]
        for name, annotation in getattr(base, "__annotations__", {}).items()
        if "TokenId" in str(annotation)
    }


def test_every_field_with_token_ids_is_tried(services: Services) -> None:
    found = fields_with_token_ids(services)
    assert "NativeSampling.logit_bias" in found
    assert found <= {field for *_, field in CASES}
