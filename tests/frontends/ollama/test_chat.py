from __future__ import annotations

from datetime import UTC, datetime

import pytest

from sapwood.schema.output import Finish
from sapwood.text.template import ChatTemplate

CHAT = "/api/chat"
GENERATE = "/api/generate"
MESSAGES = [{"role": "user", "content": "Hi"}]
ASK = {
    CHAT: {"model": "org/tiny", "messages": MESSAGES},
    GENERATE: {"model": "org/tiny", "prompt": "Hi"},
}
DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")

both = pytest.mark.parametrize("path", [CHAT, GENERATE])
streamed_or_not = pytest.mark.parametrize("stream", [False, True])


def ask(path, **extra):
    return {**ASK[path], **extra}


def text_of(answer):
    message = answer.get("message")
    return answer["response"] if message is None else message["content"]


class SteppingClock:
    """A second passes between any two readings."""

    def __init__(self):
        self.now = 100.0

    def now_s(self):
        self.now += 1.0
        return self.now


@both
def test_a_whole_answer_has_text_counts_and_durations(api_with, engine, path):
    response = api_with(clock=SteppingClock()).post(path, ask(path, stream=False))
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    created = datetime.fromisoformat(body.pop("created_at"))
    assert abs((datetime.now(UTC) - created).total_seconds()) < 60
    text = {"response": "Hello, wörld!"}
    if path == CHAT:
        text = {"message": {"role": "assistant", "content": "Hello, wörld!"}}
    assert body == {
        "model": "org/tiny",
        **text,
        "done": True,
        "done_reason": "stop",
        # Arrival, first token and end are a second apart; a quarter of one was spent in the queue.
        "total_duration": 2_000_000_000,
        "load_duration": 0,
        "prompt_eval_count": len(engine.submitted[0].prompt_ids),
        "prompt_eval_duration": 750_000_000,
        "eval_count": 15,
        "eval_duration": 1_000_000_000,
    }


@both
def test_answers_are_streamed_by_default(api, engine, json_lines, path):
    response = api.post(path, ask(path))
    assert response.headers["content-type"] == "application/x-ndjson"
    *parts, last = json_lines(response.text)
    keys = {"model", "created_at", "done", "message" if path == CHAT else "response"}
    assert {frozenset(part) for part in parts} == {frozenset(keys)}
    assert not any(part["done"] for part in parts)
    assert len(parts) == 13
    assert "".join(text_of(part) for part in parts) == "Hello, wörld!"
    assert set(last) == keys | {"done_reason", "prompt_eval_count", "eval_count", *DURATIONS}
    assert (last["done"], last["done_reason"], text_of(last)) == (True, "stop", "")
    assert last["prompt_eval_count"] == len(engine.submitted[0].prompt_ids)
    assert last["eval_count"] == 15
    assert all(isinstance(last[name], int) for name in DURATIONS)


@both
@streamed_or_not
@pytest.mark.parametrize(
    ("options", "text", "reason"),
    [
        ({"num_predict": 5}, "Hello", "length"),
        ({"stop": ["wör"]}, "Hello, ", "stop"),
        ({"stop": "!"}, "Hello, wörld", "stop"),
        ({"num_predict": -1}, "Hello, wörld!", "stop"),
        ({"num_predict": -2}, "Hello, wörld!", "stop"),
    ],
)
def test_why_an_answer_ended(api, json_lines, path, stream, options, text, reason):
    response = api.post(path, ask(path, stream=stream, options=options))
    got = json_lines(response.text) if stream else [response.json()]
    assert "".join(text_of(one) for one in got) == text
    assert got[-1]["done_reason"] == reason


@both
@streamed_or_not
def test_an_aborted_answer_keeps_its_text(api, engine, json_lines, path, stream):
    engine.fail_after = 3
    engine.failure = Finish(kind="abort")
    response = api.post(path, ask(path, stream=stream))
    got = json_lines(response.text) if stream else [response.json()]
    assert "".join(text_of(one) for one in got) == "Hel"
    assert (got[-1]["done"], got[-1]["done_reason"]) == (True, "abort")


@both
def test_every_option_arrives(api, engine, path):
    options = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "seed": 42,
        "num_predict": 7,
        "num_ctx": 1024,
        "stop": ["a", "b"],
        "repeat_penalty": 1.1,
        "presence_penalty": -0.3,
        "frequency_penalty": 0.2,
    }
    assert api.post(path, ask(path, options=options)).status_code == 200
    sampling = engine.submitted[0].options.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 40)
    assert (sampling.min_p, sampling.seed, sampling.max_new_tokens) == (0.05, 42, 7)
    assert (sampling.repetition_penalty, sampling.stop) == (1.1, ("a", "b"))
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-0.3, 0.2)


def test_without_options_the_models_defaults_hold(api_with, engine):
    api = api_with(default_sampling={"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.2})
    api.post(CHAT, ask(CHAT, options={"top_k": 0, "temperature": None, "seed": -1}))
    sampling = engine.submitted[0].options.sampling
    assert (sampling.temperature, sampling.top_k) == (0.6, -1)
    assert (sampling.repetition_penalty, sampling.seed) == (1.2, None)
    assert sampling.max_new_tokens is None


def test_ollamas_defaults_hold_for_a_model_without_any(api, api_with, engine):
    api.post(CHAT, ask(CHAT, options={"top_p": 0.5}))
    sampling = engine.submitted[0].options.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.8, 40, 0.5)
    assert (sampling.repetition_penalty, sampling.penalty_window) == (1.1, 64)
    api.post(CHAT, ask(CHAT, options={"repeat_last_n": 0, "repeat_penalty": 1}))
    sampling = engine.submitted[1].options.sampling
    assert (sampling.repetition_penalty, sampling.penalty_window) == (1, 0)
    for chosen in ({"default_sampling": {"top_p": 0.8}}, {"has_dialect_defaults": False}):
        api_with(**chosen).post(CHAT, ask(CHAT, options={}))
        sampling = engine.submitted[-1].options.sampling
        assert (sampling.temperature, sampling.top_k, sampling.repetition_penalty) == (1, -1, 1)
        assert sampling.penalty_window == -1


@both
@pytest.mark.parametrize(
    "options",
    [
        {"num_thread": 8, "num_gpu": 99, "num_batch": 512, "main_gpu": 0, "use_mmap": True},
        {"num_keep": 5, "numa": False, "low_vram": True, "f16_kv": True, "use_mlock": True},
        {"mirostat": 0, "mirostat_tau": 0.8, "mirostat_eta": 0.6, "tfs_z": 1.0, "typical_p": 1},
        {"repeat_last_n": -1, "penalize_newline": True, "vocab_only": False, "num_ctx": 10**6},
        {"stop": [], "num_ctx": None},
    ],
)
def test_options_that_ask_for_nothing_are_accepted(api, path, options):
    response = api.post(path, ask(path, options=options))
    assert response.status_code == 200, response.text


@both
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_predict": -3}, "num_predict is -3"),
        ({"num_predict": "all"}, "options.num_predict"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": "hot"}, "options.temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"repeat_penalty": 0}, "repeat_penalty is 0"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"seed": 2**70}, "seed"),
        ({"seed": 1.5}, "options.seed"),
        ({"stop": [""]}, "stop has an empty string"),
        ({"stop": [5]}, "options.stop[0]"),
        ({"mirostat": 1}, "options.mirostat"),
        ({"tfs_z": 0.5}, "options.tfs_z"),
        ({"typical_p": 0.7}, "options.typical_p"),
        ({"repeat_last_n": -2}, "options.repeat_last_n"),
        ({"temperature": "0.5"}, "options.temperature"),
        ({"penalize_newline": False, "vocab_only": True}, "options.vocab_only"),
        ({"temprature": 0.5}, "did you mean 'temperature'"),
        (5, "options"),
    ],
)
def test_options_that_cannot_be_honoured_are_a_400_that_names_them(
    api, engine, path, options, named
):
    response = api.post(path, ask(path, options=options))
    assert response.status_code == 400
    assert set(response.json()) == {"error"}
    assert named in response.json()["error"]
    assert engine.submitted == []


@both
@pytest.mark.parametrize(
    "extra",
    [
        {"format": "", "think": False, "logprobs": False, "top_logprobs": 3, "truncate": False},
        {"format": None, "think": None, "keep_alive": "5m", "shift": True, "truncate": True},
        {"keep_alive": -1, "options": {}},
        {"keep_alive": 0},
    ],
)
def test_fields_that_ask_for_nothing_are_accepted(api, path, extra):
    response = api.post(path, ask(path, **extra))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("path", "extra", "named"),
    [
        *[
            (path, extra, name)
            for path in (CHAT, GENERATE)
            for extra, name in (
                ({"format": "xml"}, "format"),
                ({"think": True}, "think"),
                ({"think": "high"}, "think"),
                ({"logprobs": 1}, "logprobs"),
                ({"logprobs": True, "top_logprobs": 999}, "top_logprobs"),
                ({"truncate": "no"}, "truncate"),
                ({"stream": "yes"}, "stream"),
                ({"keep_alive": []}, "keep_alive"),
                ({"temperature": 0.5}, "'temperature'"),
                ({"modle": "x"}, "did you mean 'model'"),
            )
        ],
        (CHAT, {"tools": [{"type": "function"}]}, "tools"),
        (CHAT, {"prompt": "a"}, "'prompt'"),
        (CHAT, {"messages": "Hi"}, "messages"),
        (CHAT, {"messages": ["Hi"]}, "messages[0]"),
        (CHAT, {"messages": [{"content": "a"}]}, "messages[0].role is required"),
        (CHAT, {"messages": [{"role": "chef", "content": "a"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (CHAT, {"messages": [*MESSAGES, {"role": "user", "images": ["x"]}]}, "messages[1].images"),
        (
            CHAT,
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "messages[0].tool_calls",
        ),
        (CHAT, {"messages": [{"role": "user", "colour": 1}]}, "messages[0].colour"),
        (GENERATE, {"template": "{{ .Prompt }}"}, "template"),
        (GENERATE, {"suffix": "b"}, "suffix"),
        (GENERATE, {"images": ["x"]}, "images"),
        (GENERATE, {"context": [1, 2]}, "context"),
        (GENERATE, {"width": 64}, "width"),
        (GENERATE, {"prompt": 5}, "prompt"),
        (GENERATE, {"raw": "yes"}, "raw"),
        (GENERATE, {"raw": True, "system": "Be brief."}, "system"),
    ],
)
def test_what_cannot_be_honoured_is_a_400_that_names_it(api, engine, path, extra, named):
    response = api.post(path, ask(path, **extra))
    assert response.status_code == 400
    assert set(response.json()) == {"error"}
    assert named in response.json()["error"]
    assert engine.submitted == []


def test_chat_goes_through_the_template(api, prompt_of):
    messages = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    assert api.post(CHAT, ask(CHAT, messages=messages)).status_code == 200
    assert prompt_of() == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_last_message_of_the_assistant_is_gone_on_with(api, prompt_of):
    messages = [*MESSAGES, {"role": "assistant", "content": "Well, I"}]
    assert api.post(CHAT, ask(CHAT, messages=messages)).status_code == 200
    assert prompt_of().endswith("<|im_start|>assistant\nWell, I")


def test_generate_takes_the_template_unless_raw(api, prompt_of):
    api.post(GENERATE, ask(GENERATE, system="Be brief."))
    assert prompt_of() == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    api.post(GENERATE, ask(GENERATE, raw=True))
    assert prompt_of() == "Hi"


def test_without_a_template_only_raw_prompts_are_taken(api_with, prompt_of):
    api = api_with(template=None)
    for path in (CHAT, GENERATE):
        response = api.post(path, ask(path))
        assert response.status_code == 400
        assert "raw=true" in response.json()["error"]
    assert api.post(GENERATE, ask(GENERATE, raw=True)).status_code == 200
    assert prompt_of() == "Hi"


def test_a_template_that_refuses_says_why(api_with):
    template = ChatTemplate("{{ raise_exception('only users, please') }}")
    response = api_with(template=template).post(CHAT, ask(CHAT))
    assert response.status_code == 400
    assert "only users, please" in response.json()["error"]


@pytest.mark.parametrize(
    ("path", "empty"),
    [(CHAT, {"messages": []}), (CHAT, {"messages": None}), (GENERATE, {"prompt": ""})],
)
@streamed_or_not
def test_without_a_prompt_the_model_is_only_said_to_be_loaded(api, engine, path, empty, stream):
    response = api.post(path, ask(path, stream=stream, **empty))
    assert response.status_code == 200
    body = response.json()
    assert (body["done"], body["done_reason"], text_of(body)) == (True, "load", "")
    assert engine.submitted == []
    engine.unavailable_reason = "draining"
    assert api.post(path, ask(path, stream=stream, **empty)).status_code == 503


@pytest.mark.parametrize("keep_alive", [0, "0", "0s"])
def test_the_model_cannot_be_unloaded(api, keep_alive):
    response = api.post(GENERATE, {"model": "org/tiny", "keep_alive": keep_alive})
    assert response.status_code == 400
    assert "unload" in response.json()["error"]


@both
@pytest.mark.parametrize("model", ["org/tiny", "org/tiny:latest", "default", "", None])
def test_names_of_the_served_model(api, path, model):
    response = api.post(path, ask(path, model=model, stream=False))
    assert response.status_code == 200
    assert response.json()["model"] == (model or "org/tiny")


@both
@pytest.mark.parametrize("model", ["llama3", "org/tiny:7b"])
def test_another_models_name_is_not_found(api, path, model):
    response = api.post(path, ask(path, model=model))
    assert response.status_code == 404
    assert model in response.json()["error"]
    assert "org/tiny" in response.json()["error"]


@both
@streamed_or_not
def test_an_engine_error_before_the_first_token_is_a_status(api, engine, path, stream):
    engine.fail_after = 0
    response = api.post(path, ask(path, stream=stream))
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json() == {"error": "out of pages"}


@both
def test_an_engine_error_amid_a_stream_is_a_line_that_ends_it(api, engine, json_lines, path):
    engine.fail_after = 3
    response = api.post(path, ask(path))
    assert response.status_code == 200
    *parts, last = json_lines(response.text)
    assert "".join(text_of(part) for part in parts) == "Hel"
    assert last == {"error": "out of pages"}


@both
@streamed_or_not
def test_an_engine_that_does_not_serve_gives_503_with_its_reason(api, engine, path, stream):
    engine.unavailable_reason = "draining"
    response = api.post(path, ask(path, stream=stream))
    assert response.status_code == 503
    assert "draining" in response.json()["error"]


def test_num_ctx_cannot_be_checked_while_the_engine_starts(api, engine):
    engine.unavailable_reason = "starting"
    assert api.post(CHAT, ask(CHAT, options={"num_ctx": 16})).status_code == 503


@both
@streamed_or_not
def test_a_prompt_beyond_the_context_is_refused(api, path, stream):
    long = "x" * 2000
    text = (
        {"prompt": long} if path == GENERATE else {"messages": [{**MESSAGES[0], "content": long}]}
    )
    response = api.post(path, ask(path, stream=stream, **text))
    assert response.status_code == 400
    assert "shorten it by" in response.json()["error"]


@both
@streamed_or_not
def test_a_bug_of_ours_shows_no_stack(api, engine, caplog, path, stream):
    engine.reply = None
    response = api.post(path, ask(path, stream=stream))
    assert response.status_code == 500
    assert response.json() == {"error": "the server failed on this request; its log says why"}


@both
@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b"", "empty"),
        (b"[1]", "object"),
        (b'{"options": {"temperature": NaN}}', "temperature"),
        (b'{"prompt": "\xff"}', "prompt"),
    ],
)
def test_broken_bodies_are_refused_in_ollamas_words(api, path, raw, named):
    response = api.request("POST", path, content=raw)
    assert response.status_code == 400
    assert named in response.json()["error"]
