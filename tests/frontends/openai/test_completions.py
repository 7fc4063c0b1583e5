from __future__ import annotations

import pytest

from sapwood.schema.namespace import cache_namespace


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("Hi", ["Hi"]),
        (["a", "bc"], ["a", "bc"]),
        ([39, 72], ["Hi"]),
        ([[39, 72], [64]], ["Hi", "a"]),
    ],
)
def test_all_forms_of_prompts(api, engine, tokenizer, events, prompt, texts, stream):
    body = {"prompt": prompt, "echo": True, "max_tokens": 5, "n": 2, "stream": stream}
    response = api.post("/v1/completions", body)
    assert response.status_code == 200
    got = dict.fromkeys(range(2 * len(texts)), "")
    answers = events(response.text) if stream else [response.json()]
    for choice in (c for answer in answers for c in answer["choices"]):
        got[choice["index"]] += choice["text"]
    assert list(got.values()) == [text + "Hello" for text in texts for _ in range(2)]
    sent = {tuple(request.prompt_ids) for request in engine.submitted}
    assert sent == {tuple(tokenizer.encode(text)) for text in texts}


def test_default_of_16_tokens_and_usage_over_prompts(api, engine):
    body = api.post("/v1/completions", {"prompt": ["a", "bc"], "n": 2}).json()
    assert engine.submitted[0].options.sampling.max_new_tokens == 16
    assert body["object"] == "text_completion"
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 60
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]


def test_the_last_event_has_text_and_reason_together(api, events):
    got = events(api.post("/v1/completions", {"prompt": "a", "max_tokens": 2, "stream": True}).text)
    choices = [event["choices"][0] for event in got]
    assert [choice["text"] for choice in choices] == ["H", "e"]
    assert [choice["finish_reason"] for choice in choices] == [None, "length"]


def test_request_ids_name_each_prompt(api, engine):
    api.post("/v1/completions", {"prompt": ["a", "b"], "rid": ["x", "y"]})
    api.post("/v1/completions", {"prompt": ["a", "b"], "rid": "z"})
    assert {r.request_id for r in engine.submitted} == {"x", "y", "z-0", "z-1"}


def test_each_prompt_may_have_a_key_and_a_salt(api, engine):
    body = {"prompt": ["a", "b"], "extra_key": ["x", "y"], "cache_salt": ["s", ""]}
    assert api.post("/v1/completions", body).status_code == 200
    assert [request.options.namespace for request in engine.submitted] == [
        cache_namespace("x", "s"),
        cache_namespace("y"),
    ]


@pytest.mark.parametrize("name", ["extra_key", "cache_salt"])
def test_there_must_be_a_key_for_each_prompt(api, engine, name):
    refused = api.post("/v1/completions", {"prompt": ["a", "b"], name: ["x"]})
    assert (refused.status_code, refused.json()["param"]) == (400, name)
    assert "1 entries but there are 2 prompts" in refused.json()["message"]
    assert engine.submitted == []


def test_best_of_may_only_equal_n(api):
    assert api.post("/v1/completions", {"prompt": "a", "n": 2, "best_of": 2}).status_code == 200
    response = api.post("/v1/completions", {"prompt": "a", "best_of": 2})
    assert response.status_code == 400
    assert response.json()["param"] == "best_of"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [10_000]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "logprobs": -1}, "logprobs"),
        ({"prompt": "a", "logprobs": 9999}, "logprobs"),
        ({"prompt": "a", "stop_regex": "(a"}, "stop_regex"),
        ({"prompt": "a", "custom_logit_processor": "unheard-of"}, "custom_logit_processor"),
        ({"prompt": ["a", "b"], "rid": ["x"]}, "rid"),
        ({"prompt": ["a", "b"], "rid": ["x", "x"]}, "rid"),
        ({"prompt": "a", "messages": []}, "messages"),
    ],
)
def test_refusals_name_the_field(api, body, param):
    response = api.post("/v1/completions", body)
    assert response.status_code == 400, response.text
    assert response.json()["param"] == param


def test_one_failed_prompt_fails_the_batch_and_aborts_the_rest(api, engine):
    response = api.post("/v1/completions", {"prompt": ["ok", "x" * 2000], "rid": "b"})
    assert response.status_code == 400
    assert engine.open == {}
