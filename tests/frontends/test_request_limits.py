"""The limits of texts that a request is known by, through every dialect (review 2: 1, 4 and 8)."""

from __future__ import annotations

import json

import pytest

from sapwood.http.routing import ROUTING_KEY_HEADER
from sapwood.schema import limits
from sapwood.schema.namespace import cache_namespace

CHAT = [{"role": "user", "content": "Hi"}]
ROUTES = {
    "/generate": {"text": "Hi"},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/chat/completions": {"messages": CHAT},
    "/v1/responses": {"input": "Hi"},
}
FIELDS = {
    "rid": limits.REQUEST_ID,
    "routing_key": limits.ROUTING_KEY,
    "extra_key": limits.CACHE_KEY,
    "cache_salt": limits.CACHE_KEY,
}
_ABSENT = {("/v1/responses", "rid"), ("/generate", "cache_salt")}
PAIRS = [(path, name) for path in ROUTES for name in FIELDS if (path, name) not in _ABSENT]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "name"), PAIRS)
def test_a_text_that_is_too_long_is_refused_by_its_field(api, path, name, stream):
    body, most = {**ROUTES[path], "stream": stream}, FIELDS[name].most
    refused = api.post(path, {**body, name: "k" * (most + 1)})
    told = refused.json()
    error = told.get("error", told) if isinstance(told, dict) else told
    assert (refused.status_code, error["param"]) == (400, name)
    assert f"{most + 1} characters but at most {most}" in error["message"]
    assert api.post(path, {**body, name: "k" * most}).status_code == 200


@pytest.mark.parametrize("path", ROUTES)
def test_the_header_has_the_limit_of_the_field(api, path):
    most = limits.ROUTING_KEY.most
    for size, status in ((most, 200), (most + 1, 400)):
        headers = {ROUTING_KEY_HEADER: "k" * size}
        assert api.post(path, ROUTES[path], headers=headers).status_code == status


@pytest.mark.parametrize("name", ["user", "safety_identifier", "prompt_cache_key", "service_tier"])
def test_a_response_does_not_repeat_long_texts(api, name):
    most = limits.CALLER.most
    assert api.post("/v1/responses", {"input": "Hi", name: "k" * most}).status_code == 200
    refused = api.post("/v1/responses", {"input": "Hi", name: "k" * (most + 1)})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)


def test_every_dialect_sends_the_engine_the_same_digest(api, engine):
    for path, body in ROUTES.items():
        assert api.post(path, {**body, "extra_key": "3:abc"}).status_code == 200
    assert {one.options.namespace for one in engine.submitted} == {cache_namespace("3:abc")}
    api.post("/v1/completions", {"prompt": "Hi", "cache_salt": "abc"})
    assert engine.submitted[-1].options.namespace != cache_namespace("3:abc")


def test_parameters_of_a_processor_count_for_each_sample(api):
    most = limits.CUSTOM_PARAMS.most
    body = {
        "text": "Hi",
        "custom_logit_processor": "unknown",
        "sampling_params": {"n": 8, "custom_params": {"a": "x" * (most // 8)}},
    }
    refused = api.post("/generate", body)
    assert refused.status_code == 400
    assert f"at most {most} are accepted" in refused.text
    body["sampling_params"]["n"] = 1
    assert "at most" not in api.post("/generate", body).text


def test_the_id_of_a_batchs_line_is_bounded():
    from sapwood.frontends.batches.lines import read_line

    most = limits.LINE_ID.most
    given = {"method": "POST", "url": "/v1/completions", "body": {"prompt": "Hi"}}
    kept = read_line(json.dumps({**given, "custom_id": "k" * most}).encode(), 1)
    assert (kept.error, kept.name) == (None, "k" * most)
    refused = read_line(json.dumps({**given, "custom_id": "k" * (most + 1)}).encode(), 2)
    assert refused.error is not None
    assert f"{most + 1} characters" in refused.error.message
    assert (refused.name, refused.is_openai) == ("line-2", True)
