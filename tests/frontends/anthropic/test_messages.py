from __future__ import annotations

import httpx
import pytest

from sapwood.frontends.anthropic.prompt import to_messages
from sapwood.frontends.anthropic.protocol import CountTokensRequest
from sapwood.frontends.serving.media import MediaParts
from sapwood.schema.output import Finish
from sapwood.text.template import ChatTemplate

PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
MESSAGES = [{"role": "user", "content": "Hi"}]
ASK = {"model": "org/tiny", "max_tokens": 100, "messages": MESSAGES}


def test_answers_with_a_whole_message(api, engine, prompt_of):
    engine.num_cached_tokens = 4
    response = api.post(PATH, ASK, headers={"anthropic-version": "2023-06-01", "x-api-key": "k"})
    assert response.status_code == 200
    body = response.json()
    assert body.pop("id").startswith("msg_")
    assert body == {
        "type": "message",
        "role": "assistant",
        "model": "org/tiny",
        "content": [{"type": "text", "text": "Hello, wörld!"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len(engine.submitted[0].prompt_ids) - 4,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 4,
            "output_tokens": 15,
        },
    }
    assert prompt_of() == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_streams_the_events_in_anthropics_order(api, engine, named_events):
    engine.num_cached_tokens = 2
    response = api.post(PATH, {**ASK, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    got = named_events(response.text)
    num_prompt_tokens = len(engine.submitted[0].prompt_ids)
    counts = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 2}
    counts |= {"input_tokens": num_prompt_tokens - 2}
    start = got[0]["message"]
    assert start.pop("id") == engine.submitted[0].request_id
    assert start == {
        "type": "message",
        "role": "assistant",
        "model": "org/tiny",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {**counts, "output_tokens": 1},
    }
    block = {"type": "text", "text": ""}
    assert got[1] == {"type": "content_block_start", "index": 0, "content_block": block}
    assert got[2] == {"type": "ping"}
    deltas = got[3:-3]
    assert {(one["type"], one["index"], one["delta"]["type"]) for one in deltas} == {
        ("content_block_delta", 0, "text_delta")
    }
    assert len(deltas) == 13
    assert "".join(one["delta"]["text"] for one in deltas) == "Hello, wörld!"
    assert got[-3:] == [
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {**counts, "output_tokens": 15},
        },
        {"type": "message_stop"},
    ]


@pytest.mark.parametrize(
    ("extra", "text", "stop_reason", "stop_sequence"),
    [
        ({"max_tokens": 5}, "Hello", "max_tokens", None),
        ({"stop_sequences": ["xyz", "wör"]}, "Hello, ", "stop_sequence", "wör"),
        ({"stop_sequences": ["xyz"]}, "Hello, wörld!", "end_turn", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_why_an_answer_ended(api, named_events, stream, extra, text, stop_reason, stop_sequence):
    response = api.post(PATH, {**ASK, **extra, "stream": stream})
    if stream:
        got = named_events(response.text)
        said = "".join(one["delta"]["text"] for one in got[3:-3])
        ended = got[-2]["delta"]
    else:
        said = response.json()["content"][0]["text"]
        ended = response.json()
    assert said == text
    assert (ended["stop_reason"], ended["stop_sequence"]) == (stop_reason, stop_sequence)


@pytest.mark.parametrize("stream", [False, True])
def test_an_aborted_answer_keeps_its_text_and_can_be_sent_back(
    api, engine, prompt_of, named_events, stream
):
    engine.fail_after = 3
    engine.failure = Finish(kind="abort")
    response = api.post(PATH, {**ASK, "stream": stream})
    assert response.status_code == 200
    if stream:
        got = named_events(response.text)
        text, ended = "".join(one["delta"]["text"] for one in got[3:-3]), got[-2]["delta"]
    else:
        text, ended = response.json()["content"][0]["text"], response.json()
    assert (text, ended["stop_reason"]) == ("Hel", "pause_turn")
    engine.fail_after = None
    messages = [*MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
    assert api.post(PATH, {**ASK, "messages": messages}).status_code == 200
    assert prompt_of().endswith("<|im_start|>assistant\nHel")


def test_every_sampling_field_arrives(api, engine):
    body = {
        **ASK,
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "stop_sequences": ["a", "b"],
    }
    assert api.post(PATH, body).status_code == 200
    sampling = engine.submitted[0].options.sampling
    assert sampling.max_new_tokens == 7
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 40)
    assert sampling.stop == ("a", "b")


def test_the_models_defaults_come_after_the_users(api_with, engine):
    api = api_with(default_sampling={"temperature": 0.6, "top_k": 20, "min_p": 0.1})
    api.post(PATH, {**ASK, "top_k": 0, "temperature": None})
    sampling = engine.submitted[0].options.sampling
    assert (sampling.temperature, sampling.top_k, sampling.min_p) == (0.6, -1, 0.1)


@pytest.mark.parametrize(
    "system",
    ["Be brief.\nBe kind.", [{"type": "text", "text": t} for t in ("Be brief.", "Be kind.")]],
)
def test_system_texts_and_blocks(api, prompt_of, system):
    assert api.post(PATH, {**ASK, "system": system}).status_code == 200
    assert prompt_of().startswith(
        "<|im_start|>system\nBe brief.\nBe kind.<|im_end|>\n<|im_start|>user"
    )


def test_blocks_and_neighbours_of_one_role_are_one_message(api, prompt_of):
    cached = {"type": "ephemeral"}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": cached}]},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "d ", "citations": None},
                {"type": "text", "text": "e"},
            ],
        },
        {"role": "user", "content": "f"},
    ]
    assert api.post(PATH, {**ASK, "messages": messages}).status_code == 200
    assert prompt_of() == (
        "<|im_start|>user\na\nb\nc<|im_end|>\n"
        "<|im_start|>assistant\nd e<|im_end|>\n"
        "<|im_start|>user\nf<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.timeout(60)
def test_many_neighbours_of_one_role_are_joined_at_once():
    said = {"role": "user", "content": "x" * 200}
    asked = CountTokensRequest(model="", messages=[said] * 100_000)
    [message] = to_messages(asked, MediaParts(()))
    assert len(message["content"]) == 100_000 * 201 - 1


def test_a_last_message_of_the_assistant_is_gone_on_with(api, prompt_of):
    messages = [*MESSAGES, {"role": "assistant", "content": "Well, I"}]
    assert api.post(PATH, {**ASK, "messages": messages}).status_code == 200
    assert prompt_of().endswith("<|im_start|>assistant\nWell, I")


def test_a_prefill_that_the_template_drops_is_refused(api_with):
    dropping = ChatTemplate("{% for m in messages %}{{ m.content[:4] }}{% endfor %}")
    messages = [*MESSAGES, {"role": "assistant", "content": "Well, I"}]
    response = api_with(template=dropping).post(PATH, {**ASK, "messages": messages})
    assert response.status_code == 400
    assert "last of messages" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", [PATH, COUNT])
def test_a_model_without_a_template_says_so(api_with, path):
    body = {key: ASK[key] for key in ("model", "messages")} | (
        {"max_tokens": 5} if path == PATH else {}
    )
    response = api_with(template=None).post(path, body)
    assert response.status_code == 400
    assert "--chat-template" in response.json()["error"]["message"]


def test_counts_the_tokens_that_a_message_would_have(api, engine):
    conversation = {"system": "Be brief.", "messages": MESSAGES}
    counted = api.post(COUNT, {"model": "org/tiny", **conversation})
    assert counted.status_code == 200
    assert engine.submitted == []
    usage = api.post(PATH, {**ASK, **conversation}).json()["usage"]
    assert counted.json() == {"input_tokens": usage["input_tokens"]}


def test_counts_beyond_the_context(api):
    body = {"messages": [{"role": "user", "content": "x" * 20_000}]}
    assert api.post(COUNT, body).json()["input_tokens"] > 20_000


def test_count_tokens_refuses_what_belongs_to_messages_only(api):
    response = api.post(COUNT, {"messages": MESSAGES, "max_tokens": 5})
    assert response.status_code == 400
    assert "'max_tokens'" in response.json()["error"]["message"]


@pytest.mark.parametrize("model", ["org/tiny", "default", "", None])
def test_names_of_the_served_model(api, model):
    response = api.post(PATH, {**ASK, "model": model})
    assert response.status_code == 200
    assert response.json()["model"] == "org/tiny"


@pytest.mark.parametrize("path", [PATH, COUNT])
def test_another_models_name_is_not_found(api, path):
    body = {"messages": MESSAGES, "model": "claude-x"} | ({"max_tokens": 5} if path == PATH else {})
    response = api.post(path, body)
    assert response.status_code == 404
    assert response.json()["type"] == "error"
    assert response.json()["error"]["type"] == "not_found_error"
    assert "org/tiny" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "extra",
    [
        {"metadata": {"user_id": "u"}, "service_tier": "auto"},
        {"cache_control": {"type": "ephemeral"}},
        {"thinking": {"type": "disabled"}, "tools": [], "tool_choice": {"type": "none"}},
        {"mcp_servers": [], "container": None, "context_management": None, "speed": "standard"},
        {"system": None, "stop_sequences": [], "stream": False, "top_k": None},
    ],
)
def test_what_asks_for_nothing_is_accepted(api, extra):
    response = api.post(PATH, {**ASK, **extra})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"tools": [{"name": "f", "input_schema": {}}]}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"mcp_servers": [{"type": "url", "url": "x", "name": "y"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"context_management": {"edits": [{}]}}, "context_management"),
        (
            {"context_management": {"edits": [{"type": "clear_thinking_20251015"}]}},
            "context_management",
        ),
        ({"output_config": {"effort": "enormous"}}, "output_config.effort"),
        ({"output_config": {"task_budget": {"total": 5}}}, "output_config.task_budget"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"inference_geo": "eu"}, "inference_geo"),
        ({"speed": "fast"}, "speed"),
        ({"max_tokens": None}, "max_tokens is required"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "five"}, "max_tokens"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"messages": None}, "messages is required"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [], "system": "x"}, "messages is empty"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is required"),
        ({"messages": [{"content": "a"}]}, "messages[0].role is required"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages[0].name"),
        (
            {"messages": [{"role": "user", "content": [{"text": "a"}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text is required",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a", "citations": [{}]}]}
                ]
            },
            "messages[0].content[0].citations",
        ),
        ({"system": 5}, "system"),
        ({"system": [{"type": "image", "source": {}}]}, "system[0]"),
        ({"temperature": 1.01}, "temperature is 1.01 but must be in [0.0, 1.0]"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"stop_sequences": "a"}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences has an empty string"),
        ({"stream": "maybe"}, "stream"),
        ({"stop": ["a"]}, "'stop'"),
        ({"max_token": 5}, "did you mean 'max_tokens'"),
    ],
)
def test_what_cannot_be_honoured_is_a_400_that_names_it(api, engine, extra, named):
    response = api.post(PATH, {**ASK, **extra})
    assert response.status_code == 400
    body = response.json()
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert named in body["error"]["message"]
    assert engine.submitted == []


def test_encrypted_thinking_is_passed_over(api, engine):
    said = [{"type": "redacted_thinking", "data": "EmwKAhgB"}, {"type": "text", "text": "Hello!"}]
    asked = {"role": "user", "content": "Hi"}
    prompts = []
    for content in (said, said[1:]):
        messages = [asked, {"role": "assistant", "content": content}, asked]
        assert api.post(PATH, {"max_tokens": 5, "messages": messages}).status_code == 200
        prompts.append(engine.submitted[-1].prompt_ids)
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    "kind",
    [
        "document",
        "search_result",
        "tool_use",
        "thinking",
        "redacted_thinking",
    ],
)
@pytest.mark.parametrize("path", [PATH, COUNT])
def test_other_blocks_are_refused_by_place(api, path, kind):
    content = [{"type": "text", "text": "look"}, {"type": kind}]
    body = {"messages": [{"role": "user", "content": content}]}
    response = api.post(path, body | ({"max_tokens": 5} if path == PATH else {}))
    assert response.status_code == 400
    assert f"messages[0].content[1] is of type '{kind}'" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b"", "empty"),
        (b"[1]", "object"),
        (b'{"max_tokens": NaN}', "max_tokens"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "content"),
        (b'{"messages": [{"role": "user", "content": "Hi', "content"),
    ],
)
@pytest.mark.parametrize("path", [PATH, COUNT])
def test_broken_bodies_are_refused_in_anthropics_words(api, path, raw, named):
    response = api.request("POST", path, content=raw)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert named in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", PATH, 405, "invalid_request_error"),
        ("POST", f"{PATH}/threads", 404, "not_found_error"),
    ],
)
def test_wrong_paths_and_methods(api, method, path, status, kind):
    response = api.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == kind


def test_a_page_of_another_origin_is_refused_in_anthropics_words(api):
    response = api.post(PATH, ASK, headers={"origin": "http://evil.example"})
    assert response.status_code == 403
    assert response.json()["error"]["type"] == "permission_error"


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_error_before_the_first_token_is_a_status(api, engine, stream):
    engine.fail_after = 0
    response = api.post(PATH, {**ASK, "stream": stream})
    assert response.status_code == 529
    assert response.headers["retry-after"] == "1"
    assert response.json() == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "out of pages"},
    }


@pytest.mark.parametrize(
    ("status", "kind"),
    [(503, "overloaded_error"), (500, "api_error"), (400, "invalid_request_error")],
)
def test_an_engine_error_amid_a_stream_is_an_event_that_ends_it(
    api, engine, named_events, status, kind
):
    engine.fail_after = 3
    engine.failure = Finish(kind="error", message="out of luck", status=status)
    response = api.post(PATH, {**ASK, "stream": True})
    assert response.status_code == 200
    got = named_events(response.text)
    assert "".join(one["delta"]["text"] for one in got[3:-1]) == "Hel"
    assert got[-1] == {"type": "error", "error": {"type": kind, "message": "out of luck"}}


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_does_not_serve_gives_529_with_its_reason(api, engine, stream):
    engine.unavailable_reason = "draining"
    response = api.post(PATH, {**ASK, "stream": stream})
    assert response.status_code == 529
    assert "draining" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context_is_refused(api, stream):
    messages = [{"role": "user", "content": "x" * 2000}]
    response = api.post(PATH, {**ASK, "messages": messages, "stream": stream})
    assert response.status_code == 400
    assert "shorten it by" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_of_ours_shows_no_stack(api, engine, caplog, stream):
    engine.reply = None
    response = api.post(PATH, {**ASK, "stream": stream})
    assert response.status_code == 500
    assert response.json()["error"] == {
        "type": "api_error",
        "message": "the server failed on this request; its log says why",
    }


def test_a_message_can_be_aborted_by_its_id(live, engine):
    engine.reply = "x" * 500
    engine.step_s = 0.02
    with httpx.stream("POST", f"{live.url}{PATH}", json={**ASK, "stream": True}) as response:
        parts = response.iter_text()
        next(parts)
        [request_id] = engine.open
        assert request_id.startswith("msg_")
        aborted = httpx.post(f"{live.url}/abort_request", json={"rid": request_id})
        assert aborted.json()["aborted"] == [request_id]
        assert "pause_turn" in "".join(parts)


def test_the_openapi_document_describes_the_bodies(api):
    document = api.get("/openapi.json").json()
    for path, name in ((PATH, "MessagesRequest"), (COUNT, "CountTokensRequest")):
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert content["schema"] == {"$ref": f"#/components/schemas/{name}"}
        assert "messages" in document["components"]["schemas"][name]["required"]
