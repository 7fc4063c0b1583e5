from __future__ import annotations

import pytest

from sapwood.base.errors import ConfigError
from sapwood.schema.namespace import cache_namespace

ASK = {"messages": [{"role": "user", "content": "Hi"}]}


def test_answers_with_content_finish_and_usage(api, engine, prompt_of):
    engine.num_cached_tokens = 4
    response = api.post("/v1/chat/completions", {**ASK, "model": "org/tiny"})
    assert response.status_code == 200
    body = response.json()
    num_prompt_tokens = len(engine.submitted[0].prompt_ids)
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "org/tiny"
    assert body["metadata"] == {"weight_version": "default"}
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello, wörld!"},
            "logprobs": None,
            "finish_reason": "stop",
            "matched_stop": engine.tokenizer.eos_token_id,
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": 15,
        "total_tokens": num_prompt_tokens + 15,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert prompt_of() == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_chat_may_use_what_the_context_leaves(api, engine):
    api.post("/v1/chat/completions", ASK)
    assert engine.submitted[0].options.sampling.max_new_tokens is None


def test_streams_role_then_text_then_finish(api, events):
    response = api.post("/v1/chat/completions", {**ASK, "stream": True, "rid": "r1"})
    assert response.headers["content-type"].startswith("text/event-stream")
    got = events(response.text)
    assert {event["id"] for event in got} == {"r1"}
    assert {event["object"] for event in got} == {"chat.completion.chunk"}
    choices = [event["choices"][0] for event in got]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["delta"].get("content", "") for c in choices) == "Hello, wörld!"
    assert choices[-1]["delta"] == {}
    assert choices[-1]["finish_reason"] == "stop"
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert all("usage" not in event for event in got)


def test_include_usage_adds_a_last_event(api, events, engine):
    options = {"stream_options": {"include_usage": True}}
    got = events(api.post("/v1/chat/completions", {**ASK, "stream": True, **options}).text)
    assert got[-1]["choices"] == []
    assert got[-1]["usage"]["completion_tokens"] == 15
    assert got[-1]["usage"]["prompt_tokens"] == len(engine.submitted[0].prompt_ids)
    assert all(event["usage"] is None for event in got[:-1])


def test_continuous_usage_grows_with_the_answer(api, events):
    options = {"stream_options": {"continuous_usage_stats": True}}
    got = events(api.post("/v1/chat/completions", {**ASK, "stream": True, **options}).text)
    counts = [event["usage"]["completion_tokens"] for event in got if "usage" in event]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == 15


@pytest.mark.parametrize("stream", [False, True])
def test_n_gives_that_many_choices_and_counts_the_prompt_once(api, events, engine, stream):
    body = {**ASK, "n": 3, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    response = api.post("/v1/chat/completions", body)
    if stream:
        got = events(response.text)
        texts = dict.fromkeys(range(3), "")
        for choice in (c for event in got for c in event["choices"]):
            texts[choice["index"]] += choice["delta"].get("content", "")
        usage = got[-1]["usage"]
    else:
        texts = {c["index"]: c["message"]["content"] for c in response.json()["choices"]}
        usage = response.json()["usage"]
    assert texts == dict.fromkeys(range(3), "Hello, wörld!")
    assert usage["completion_tokens"] == 45
    assert usage["prompt_tokens"] == len(engine.submitted[0].prompt_ids)


def test_every_sampling_field_arrives(api, engine):
    body = {
        **ASK,
        "max_completion_tokens": 7,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "presence_penalty": -0.3,
        "logit_bias": {"5": -100, "6": 3.5},
        "seed": 42,
        "stop": ["a", "b", "c", "d", "e"],
        "stop_token_ids": [9],
        "allowed_token_ids": [5, 9],
        "ignore_eos": True,
        "no_stop_trim": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "priority": 3,
        "extra_key": "tenant",
    }
    assert api.post("/v1/chat/completions", body).status_code == 200
    [request] = engine.submitted
    sampling = request.options.sampling
    assert (sampling.max_new_tokens, sampling.min_new_tokens) == (7, 2)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 40)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.05, 1.1)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.2, -0.3)
    assert sampling.logit_bias == {5: -100.0, 6: 3.5}
    assert sampling.seed == 42
    assert sampling.stop == ("a", "b", "c", "d", "e")
    assert sampling.stop_token_ids == (9,)
    assert sampling.allowed_token_ids == (5, 9)
    assert sampling.ignore_eos
    assert sampling.no_stop_trim
    assert not sampling.skip_special_tokens
    assert not sampling.spaces_between_special_tokens
    assert request.options.priority == 3
    assert request.options.namespace == cache_namespace("tenant")


def test_the_models_defaults_come_before_openais_and_after_the_users(api_with, engine):
    api = api_with(default_sampling={"temperature": 0.6, "top_k": 20})
    api.post("/v1/chat/completions", {**ASK, "top_k": 5, "temperature": None})
    sampling = engine.submitted[0].options.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 5, 1.0)


@pytest.mark.parametrize("defaults", [{"temperature": -1.0}, {"seed": 3}])
def test_impossible_default_sampling_is_refused_at_start(api_with, defaults):
    with pytest.raises(ConfigError, match=next(iter(defaults))):
        api_with(default_sampling=defaults)


def test_a_stop_string_ends_the_answer(api):
    choice = api.post("/v1/chat/completions", {**ASK, "stop": "wör"}).json()["choices"][0]
    assert choice["message"]["content"] == "Hello, "
    assert choice["finish_reason"] == "stop"
    assert choice["matched_stop"] == "wör"


def test_a_token_limit_ends_the_answer(api):
    choice = api.post("/v1/chat/completions", {**ASK, "max_tokens": 5}).json()["choices"][0]
    assert choice["message"]["content"] == "Hello"
    assert choice["finish_reason"] == "length"
    assert choice["matched_stop"] is None


def test_salt_and_extra_key_both_part_the_cache(api, engine):
    for keys in ({"cache_salt": "a", "extra_key": "bc"}, {"cache_salt": "ab", "extra_key": "c"}):
        api.post("/v1/chat/completions", {**ASK, **keys})
    first, second = (request.options.namespace for request in engine.submitted)
    assert first != second
    assert first == cache_namespace("bc", "a")


def test_text_parts_and_the_developer_role(api, prompt_of):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
    ]
    assert api.post("/v1/chat/completions", {"messages": messages}).status_code == 200
    assert "<|im_start|>system\nBe brief.<|im_end|>" in prompt_of()
    assert "<|im_start|>user\none two<|im_end|>" in prompt_of()


def test_continue_final_message_leaves_the_answer_open(api, prompt_of):
    messages = [*ASK["messages"], {"role": "assistant", "content": "Well, I"}]
    body = {"messages": messages, "continue_final_message": True}
    assert api.post("/v1/chat/completions", body).status_code == 200
    assert prompt_of().endswith("<|im_start|>assistant\nWell, I")


def test_without_a_generation_prompt(api, prompt_of):
    api.post("/v1/chat/completions", {**ASK, "add_generation_prompt": False})
    assert prompt_of().endswith("Hi<|im_end|>\n")


def test_template_arguments_arrive(api_with, prompt_of):
    from sapwood.text.template import ChatTemplate

    api = api_with(template=ChatTemplate("{{ mood }}: {{ messages[0].content }}"))
    api.post("/v1/chat/completions", {**ASK, "chat_template_kwargs": {"mood": "calm"}})
    assert prompt_of() == "calm: Hi"


def test_a_model_without_a_template_refuses_chat(api_with):
    response = api_with(template=None).post("/v1/chat/completions", ASK)
    assert response.status_code == 400
    assert "--chat-template" in response.json()["message"]


@pytest.mark.parametrize("model", ["org/tiny", "default", "", None])
def test_names_of_the_served_model(api, model):
    assert api.post("/v1/chat/completions", {**ASK, "model": model}).status_code == 200


def test_another_models_name_is_not_found(api):
    response = api.post("/v1/chat/completions", {**ASK, "model": "gpt-9"})
    assert response.status_code == 404
    body = response.json()
    assert body["object"] == "error"
    assert body["param"] == "model"
    assert "org/tiny" in body["message"]


@pytest.mark.parametrize(
    "extra",
    [
        {"logprobs": False, "top_logprobs": 0, "tools": [], "tool_choice": "none"},
        {"response_format": {"type": "text"}, "lora_path": None, "regex": None},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"safety_identifier": "s", "prompt_cache_key": "k", "separate_reasoning": True},
        {"frequency_penalty": None, "stop": None, "n": None, "no_such_field": None},
        {"stop": "", "modalities": ["text"], "reasoning_effort": None},
    ],
)
def test_what_asks_for_nothing_is_accepted(api, extra):
    response = api.post("/v1/chat/completions", {**ASK, **extra})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 9999}, "top_logprobs"),
        ({"stop_regex": ["a", "b*"]}, "stop_regex"),
        ({"custom_logit_processor": "unheard-of"}, "custom_logit_processor"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"lora_id": "x"}, "lora_id"),
        ({"return_hidden_states": True}, "return_hidden_states"),
        ({"verbosity": "low"}, "verbosity"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(api, engine, extra, param):
    response = api.post("/v1/chat/completions", {**ASK, **extra})
    assert response.status_code == 400
    assert response.json()["param"] == param
    assert param in response.json()["message"]
    assert engine.submitted == []


@pytest.mark.parametrize("kind", ["image_url", "video_url", "audio_url", "input_audio"])
def test_media_parts_are_refused_by_place(api, kind):
    content = [{"type": "text", "text": "look"}, {"type": kind, kind: {"url": "x"}}]
    response = api.post(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": content}]}
    )
    assert response.status_code == 400
    assert response.json()["param"] == "messages[0].content[1]"
    assert kind.removesuffix("_url") in response.json()["message"]


def test_an_unknown_field_gets_a_hint(api):
    response = api.post("/v1/chat/completions", {**ASK, "temprature": 0.1})
    assert response.status_code == 400
    assert response.json()["param"] == "temprature"
    assert "'temperature'" in response.json()["message"]


def test_errors_speak_of_the_fields_that_were_sent(api):
    body = {**ASK, "max_completion_tokens": 3, "min_tokens": 5}
    response = api.post("/v1/chat/completions", body)
    assert response.status_code == 400
    assert response.json()["param"] == "min_tokens"
    assert "new_tokens" not in response.json()["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_error_before_the_first_token_is_a_status(api, engine, stream):
    engine.fail_after = 0
    response = api.post("/v1/chat/completions", {**ASK, "stream": stream})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["message"] == "out of pages"
    assert response.json()["code"] == 503


def test_an_engine_error_amid_a_stream_is_an_event_that_ends_it(api, engine, events):
    engine.fail_after = 3
    response = api.post("/v1/chat/completions", {**ASK, "stream": True})
    assert response.status_code == 200
    got = events(response.text)
    assert got[-1]["error"]["message"] == "out of pages"
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in got[:-1]) == "Hel"


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_does_not_serve_gives_503_with_its_reason(api, engine, stream):
    engine.unavailable_reason = "draining"
    response = api.post("/v1/chat/completions", {**ASK, "stream": stream})
    assert response.status_code == 503
    assert "draining" in response.json()["message"]
    assert "retry-after" in response.headers


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context_is_refused(api, stream):
    body = {"messages": [{"role": "user", "content": "x" * 2000}], "stream": stream}
    response = api.post("/v1/chat/completions", body)
    assert response.status_code == 400
    assert "shorten it by" in response.json()["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_of_ours_shows_no_stack(api, engine, caplog, stream):
    engine.reply = None  # type: ignore[assignment]
    response = api.post("/v1/chat/completions", {**ASK, "stream": stream})
    assert response.status_code == 500
    assert response.json()["message"] == "the server failed on this request; its log says why"
    assert "Traceback" not in response.text
