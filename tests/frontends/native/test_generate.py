from __future__ import annotations

import pytest

from sapwood.schema.namespace import cache_namespace

GREEDY = {"temperature": 0, "max_new_tokens": 5}


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_one_text(api, engine, method):
    engine.num_cached_tokens = 1
    body = {"text": "Hi", "sampling_params": GREEDY, "rid": "r", "priority": 2, "extra_key": "k"}
    answer = api.request(method, "/generate", json=body).json()
    assert answer["text"] == "Hello"
    assert answer["output_ids"] == engine.tokenizer.encode("Hello")
    meta = answer["meta_info"]
    assert meta.pop("e2e_latency") > 0
    assert meta.pop("decode_throughput") > 0
    assert meta == {
        "id": "r",
        "finish_reason": {"type": "length", "length": 5},
        "prompt_tokens": 2,
        "completion_tokens": 5,
        "cached_tokens": 1,
        "weight_version": "default",
        "queue_time": 0.25,
    }
    [request] = engine.submitted
    assert (request.options.priority, request.options.namespace) == (2, cache_namespace("k"))
    assert request.options.sampling.is_greedy


def test_defaults_are_the_native_ones_whatever_the_model_says(api_with, engine):
    api_with(default_sampling={"temperature": 0.1}).post("/generate", {"text": "Hi"})
    sampling = engine.submitted[0].options.sampling
    assert (sampling.temperature, sampling.max_new_tokens) == (1.0, 128)


def test_end_of_sequence_and_stop_string_are_told_apart(api, engine):
    answer = api.post("/generate", {"text": "Hi"}).json()
    eos = engine.tokenizer.eos_token_id
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": eos}
    answer = api.post("/generate", {"text": "Hi", "sampling_params": {"stop": "lo"}}).json()
    assert answer["text"] == "Hel"
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": "lo"}


@pytest.mark.parametrize(
    ("prompt", "num_answers"),
    [
        ({"text": ["a", "b"]}, 2),
        ({"input_ids": [[1, 2], [3]]}, 2),
        ({"input_ids": [[1]]}, 1),
        ({"text": "a", "sampling_params": {"n": 3}}, 3),
        ({"text": ["a", "b"], "sampling_params": {"n": 2}}, 4),
    ],
)
def test_lists_and_samples_give_lists(api, prompt, num_answers):
    answers = api.post("/generate", prompt).json()
    assert [answer["text"] for answer in answers] == ["Hello, wörld!"] * num_answers
    assert len({answer["meta_info"]["id"] for answer in answers}) == num_answers


def test_token_ids_are_one_prompt(api, engine):
    assert api.post("/generate", {"input_ids": [1, 2, 3]}).json()["text"] == "Hello, wörld!"
    assert engine.submitted[0].prompt_ids == [1, 2, 3]


def test_parameters_per_prompt(api, engine):
    body = {
        "text": ["a", "b"],
        "sampling_params": [{"max_new_tokens": 1}, {"max_new_tokens": 2, "sampling_seed": 7}],
        "rid": ["x", "y"],
        "extra_key": ["k", "l"],
    }
    answers = api.post("/generate", body).json()
    assert [answer["text"] for answer in answers] == ["H", "He"]
    by_id = {request.request_id: request for request in engine.submitted}
    assert [by_id[rid].options.namespace for rid in "xy"] == [cache_namespace(key) for key in "kl"]
    assert by_id["y"].options.sampling.seed == 7


def test_streamed_text_is_cumulative(api, events):
    body = {"text": "Hi", "sampling_params": GREEDY, "stream": True}
    got = events(api.post("/generate", body).text)
    assert [event["text"] for event in got] == ["H", "He", "Hel", "Hell", "Hello"]
    assert [len(event["output_ids"]) for event in got] == [1, 2, 3, 4, 5]
    assert [event["meta_info"]["completion_tokens"] for event in got] == [1, 2, 3, 4, 5]
    reasons = [event["meta_info"]["finish_reason"] for event in got]
    assert reasons == [None] * 4 + [{"type": "length", "length": 5}]
    assert "index" not in got[0]


def test_streamed_batches_say_which_answer(api, events):
    body = {"text": ["a", "b"], "sampling_params": {**GREEDY, "n": 2}, "stream": True}
    got = events(api.post("/generate", body).text)
    last = {event["index"]: event["text"] for event in got}
    assert last == dict.fromkeys(range(4), "Hello")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "text"),
        ({"text": []}, "text"),
        ({"text": 5}, "text"),
        ({"input_ids": [1, [2]]}, "input_ids"),
        ({"input_ids": [[]]}, "input_ids"),
        ({"input_ids": [1.5]}, "input_ids[0]"),
        ({"input_ids": [2**40]}, "input_ids[0]"),
        ({"text": "a", "return_logprob": 2}, "return_logprob"),
        ({"text": "a", "top_logprobs_num": 2}, "top_logprobs_num"),
        ({"text": "a", "logprob_start_len": 0}, "logprob_start_len"),
        ({"text": "a", "token_ids_logprob": [1]}, "token_ids_logprob"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": 1}, "logprob_start_len"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": -2}, "logprob_start_len"),
        ({"text": "a", "return_logprob": True, "top_logprobs_num": 999}, "top_logprobs_num"),
        ({"text": "a", "return_logprob": True, "token_ids_logprob": [9999]}, "token_ids_logprob"),
        ({"text": "a", "return_logprob": [True, False]}, "return_logprob"),
        (
            {"text": "a", "return_logprob": True, "token_ids_logprob": [1, [2]]},
            "token_ids_logprob",
        ),
        ({"text": "a", "custom_logit_processor": "unheard-of"}, "custom_logit_processor"),
        ({"text": "a", "custom_logit_processor": '{"callable": ""}'}, "custom_logit_processor"),
        ({"text": "a", "sampling_params": {"custom_params": 5}}, "sampling_params.custom_params"),
        ({"text": "a", "sampling_params": {"stop_regex": "(a"}}, "sampling_params.stop_regex"),
        (
            {"text": "a", "sampling_params": {"logit_bias": {"9999": 1}}},
            "sampling_params.logit_bias",
        ),
        (
            {"text": "a", "sampling_params": {"stop_token_ids": [9999]}},
            "sampling_params.stop_token_ids",
        ),
        (
            {"text": "a", "sampling_params": {"stream_interval": 0}},
            "sampling_params.stream_interval",
        ),
        ({"text": "a", "image_data": "x"}, "image_data"),
        ({"text": "a", "lora_path": "x"}, "lora_path"),
        ({"text": "a", "session_params": {"id": "s"}}, "session_params.id"),
        ({"text": "a", "sampling_params": {"regex": ""}}, "sampling_params.regex"),
        ({"text": "a", "sampling_params": {"json_schema": "{"}}, "sampling_params.json_schema"),
        ({"text": "a", "sampling_params": {"top_p": 2}}, "sampling_params.top_p"),
        ({"text": "a", "sampling_params": {"max_tokens": 2}}, "sampling_params.max_tokens"),
        (
            {"text": "a", "sampling_params": {"max_new_tokens": -1}},
            "sampling_params.max_new_tokens",
        ),
        (
            {"text": "a", "sampling_params": {"sampling_seed": 2**70}},
            "sampling_params.sampling_seed",
        ),
        ({"text": ["a"], "sampling_params": [{"top_k": 0}]}, "sampling_params[0].top_k"),
        ({"text": ["a"], "sampling_params": [{}, {}]}, "sampling_params"),
        ({"text": ["a", "b"], "sampling_params": [{"n": 2}, {}]}, "sampling_params.n"),
        ({"text": "a", "rid": ""}, "rid"),
        ({"text": ["a", "b"], "rid": ["x"]}, "rid"),
        ({"text": ["a", "b"], "rid": ["x", "x"]}, "rid"),
        ({"text": "a", "prioriy": 1}, "prioriy"),
    ],
)
def test_refusals_name_the_field(api, engine, body, param):
    response = api.post("/generate", body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert engine.open == {}


def test_harmless_values_are_accepted(api):
    body = {
        "text": "a",
        "return_logprob": False,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "image_data": None,
        "log_metrics": True,
        "sampling_params": {"stream_interval": 1, "regex": None, "stop": None},
    }
    assert api.post("/generate", body).status_code == 200
