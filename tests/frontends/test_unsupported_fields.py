"""The rule for fields through whole applications: what peers' clients send, what is honoured, and
`--unsupported-fields warn`."""

from __future__ import annotations

import json
import logging

import pytest
from anthropic.types.beta.message_create_params import MessageCreateParamsBase as AnthropicParams
from ollama import _types as ollama_types
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from openai.types.shared_params.reasoning import Reasoning

from sapwood.frontends.anthropic import protocol as anthropic
from sapwood.frontends.ollama import protocol as ollama
from sapwood.frontends.openai import protocol as openai
from sapwood.frontends.responses import protocol as responses
from sapwood.frontends.server import create_app
from sapwood.http.unsupported import HEADER
from sapwood.schema.unsupported import MAX_NAME_CHARS, MAX_NAMED
from tests.frontends.chats import changes, tools_of
from tests.frontends.conftest import Api
from tests.frontends.peer_requests import HI, REQUESTS
from tests.frontends.pooling import PoolingEngine, classifies, over

CHAT = "/v1/chat/completions"
CHAT_BODY = {"messages": HI, "max_tokens": 4}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture
def warns(api_with):
    return api_with(on_unsupported="warn")


@pytest.mark.parametrize("peer", REQUESTS)
def test_what_a_peers_client_sends_by_default_is_answered(api, warns, peer):
    path, body = REQUESTS[peer]
    response = api.post(path, body)
    assert response.status_code == 200, response.text
    warned = warns.post(path, body)
    assert (warned.status_code, warned.headers.get(HEADER)) == (200, None)


@pytest.mark.parametrize(
    ("table", "client"),
    [
        (openai.CHAT_FIELDS, ChatParams.__annotations__),
        (openai.COMPLETION_FIELDS, CompletionParams.__annotations__),
        (responses.REQUEST_FIELDS, ResponseCreateParamsBase.__annotations__),
        (responses.REASONING_FIELDS, Reasoning.__annotations__),
        (anthropic.MESSAGES_FIELDS, AnthropicParams.__annotations__),
        (ollama.CHAT_FIELDS, ollama_types.ChatRequest.model_fields),
        (ollama.GENERATE_FIELDS, ollama_types.GenerateRequest.model_fields),
        (ollama.OPTION_FIELDS, ollama_types.Options.model_fields),
        (ollama.MESSAGE_FIELDS, ollama_types.Message.model_fields),
    ],
)
def test_every_field_of_an_official_client_is_known(table, client):
    assert set(client) - set(table.names) == set()


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        (CHAT, {**CHAT_BODY, "verbosity": "low"}, "verbosity"),
        (CHAT, {**CHAT_BODY, "no_such_field": 1}, "no_such_field"),
        (CHAT, {**CHAT_BODY, "functions": [{"name": "f"}]}, "functions"),
        (CHAT, {**CHAT_BODY, "tools": [{"type": "web_search"}]}, "tools[0]"),
        (CHAT, {**CHAT_BODY, "thinking_budget": 5}, "thinking_budget"),
        (CHAT, {"messages": [{**HI[0], "colour": "red"}]}, "messages[0].colour"),
        (CHAT, {**CHAT_BODY, "stream": True, "no_such_field": 1}, "no_such_field"),
        ("/v1/completions", {"prompt": "a", "best_of": 3}, "best_of"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        (
            CHAT,
            {**CHAT_BODY, "response_format": {"type": "text", "colour": 1}},
            "response_format.colour",
        ),
        (
            "/v1/responses",
            {"input": "a", "text": {"format": {"type": "json_object", "colour": 1}}},
            "text.format.colour",
        ),
        ("/generate", {"text": "a", "return_entropy": True}, "return_entropy"),
        ("/generate", {"text": "a", "sampling_params": {"x": 1}}, "sampling_params.x"),
        ("/v1/responses", {"input": "a", "text": {"verbosity": "low"}}, "text.verbosity"),
        ("/v1/responses", {"input": "a", "tools": [{"type": "web_search"}]}, "tools[0]"),
        ("/v1/responses", {"input": "a", "store": True}, "store"),
        ("/v1/responses", {"input": "a", "include": ["the.moon"]}, "include"),
        ("/v1/responses", {"input": "a", "stream": True, "colour": 1}, "colour"),
        ("/v1/messages", {**CHAT_BODY, "mcp_servers": [{"name": "x"}]}, "mcp_servers"),
        ("/v1/messages", {**CHAT_BODY, "thinking": {"type": "enabled"}}, "thinking"),
        ("/v1/messages", {**CHAT_BODY, "tools": [{"type": "bash_20250124"}]}, "tools[0]"),
        ("/v1/messages", {**CHAT_BODY, "stream": True, "colour": 1}, "colour"),
        ("/api/chat", {"messages": HI, "options": {"mirostat": 2}}, "options.mirostat"),
        ("/api/chat", {"messages": HI, "think": True}, "think"),
        ("/api/chat", {"keep_alive": 0}, "keep_alive"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "lora_path": "x"}, "lora_path"),
    ],
)
def test_a_field_in_vain_is_an_error_or_named_in_the_answer(
    api, warns, engine, caplog, path, body, named
):
    refused = api.post(path, body)
    assert refused.status_code == 400
    assert named in refused.text
    assert engine.submitted == []
    with caplog.at_level(logging.WARNING):
        answered = warns.post(path, body)
    if path == "/v1/rerank":
        # The scripted model writes "yes" in several tokens; that is told, and the field too.
        assert "tokens" in answered.text
    else:
        assert answered.status_code == 200, answered.text
    assert answered.headers[HEADER] == named
    assert [record.getMessage() for record in caplog.records if named in record.getMessage()] == [
        f"{path}: answered without the unsupported fields {named}"
    ]


def test_what_sglangs_router_sends_to_rerank(services):
    body = {"query": "q", "documents": ["a", "b"], "model": "unknown", "top_k": 1, "user": "u"}
    body |= {"return_documents": True, "no_logs": False, "background": False, "rid": None}
    body |= {"return_bytes": False, "return_entropy": False}
    pooling = classifies("relevant")
    answer = Api(create_app(over(services, PoolingEngine(num_values=1), pooling))).post(
        "/v1/rerank", body
    )
    assert answer.status_code == 200, answer.text
    assert len(answer.json()) == 1


def test_an_answer_to_known_fields_has_no_header(warns, caplog):
    assert HEADER not in warns.post(CHAT, CHAT_BODY).headers
    assert not [one for one in caplog.records if "unsupported" in one.getMessage()]


def test_what_no_field_asks_for_is_still_an_error(warns):
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    for extra in ({"messages": image}, {"top_p": 7}, {"model": "gpt-4"}):
        assert warns.post(CHAT, CHAT_BODY | extra).status_code in (400, 404)


def test_names_in_the_header_are_bounded_and_plain(warns, caplog):
    names = ["a\r\nset-cookie: x=1", "ü, b", "x" * 10_000, *(f"field{i}" for i in range(50))]
    answered = warns.post(CHAT, CHAT_BODY | dict.fromkeys(names, 1))
    assert answered.status_code == 200
    assert "set-cookie" not in answered.headers
    told = answered.headers[HEADER]
    *named, others = told.split(", ")
    assert len(named) == MAX_NAMED
    assert max(map(len, named)) == MAX_NAME_CHARS
    assert others == f"and {len(names) - MAX_NAMED} more"
    assert named[:2] == ["a??set-cookie??x?1", "???b"]
    [line] = [one.getMessage() for one in caplog.records if "unsupported" in one.getMessage()]
    assert len(line) < 2000
    assert "\n" not in line


def test_one_calls_fields_are_not_named_in_anothers_answer(warns):
    assert warns.post(CHAT, CHAT_BODY | {"verbosity": "low"}).headers[HEADER] == "verbosity"
    assert HEADER not in warns.post(CHAT, CHAT_BODY).headers


# ---- coercion --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": HI, "max_tokens": "4", "temperature": "0.5", "n": 2.0, "top_k": "3"}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 4.0, "temperature": "0.5", "n": "2"}),
        (
            "/generate",
            {
                "text": "a",
                "stream": "false",
                "sampling_params": {"max_new_tokens": "4", "temperature": "0.5", "n": "2"},
            },
        ),
        ("/v1/responses", {"input": "a", "max_output_tokens": "4", "temperature": "0.5"}),
        ("/v1/messages", {"messages": HI, "max_tokens": "4", "temperature": "0.5"}),
    ],
)
def test_texts_stand_for_numbers(api, engine, path, body):
    assert api.post(path, body).status_code == 200
    sampling = engine.submitted[0].options.sampling
    assert (sampling.max_new_tokens, sampling.temperature) == (4, 0.5)
    assert isinstance(sampling.max_new_tokens, int)


@pytest.mark.parametrize("text", ["yes", "On", "TRUE", "t", "1", "Y"])
def test_texts_stand_for_truth_values(api, text):
    streamed = api.post(
        CHAT, CHAT_BODY | {"stream": text, "stream_options": {"include_usage": text}}
    )
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert '"usage":{' in streamed.text
    refused = {"yes": "no", "On": "off", "TRUE": "False", "t": "f", "1": "0", "Y": "n"}[text]
    answer = api.post(CHAT, CHAT_BODY | {"stream": refused})
    assert answer.headers["content-type"].startswith("application/json")


def test_other_texts_are_no_truth_values(api):
    refused = api.post(CHAT, CHAT_BODY | {"stream": "ja"})
    assert (refused.status_code, refused.json()["param"]) == (400, "stream")


def test_a_text_stays_one_where_a_field_may_be_both(api):
    """json_schema may be a schema in text, or true."""
    refused = api.post(CHAT, CHAT_BODY | {"json_schema": "yes"})
    assert (refused.status_code, refused.json()["param"]) == (400, "json_schema")


@pytest.mark.parametrize(
    "extra", [{"n": "two"}, {"temperature": "nan"}, {"temperature": "inf"}, {"max_tokens": 2.5}]
)
def test_other_texts_are_refused_by_name(api, engine, extra):
    refused = api.post(CHAT, CHAT_BODY | extra)
    assert (refused.status_code, refused.json()["param"]) == (400, next(iter(extra)))
    assert engine.submitted == []


def test_a_profile_takes_its_number_of_steps_as_a_text(api, engine):
    assert api.post("/start_profile", {"num_steps": "5"}).status_code == 200
    assert engine.calls[0].num_steps == 5


# ---- what is honoured ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"json": SCHEMA}, "json_schema", '"a"'),
        ({"regex": "a+"}, "regex", "a+"),
        ({"choice": ["x", "y"]}, None, "x"),
        ({"grammar": 'root ::= "a"'}, None, "root"),
        ({"json_object": True, "disable_any_whitespace": False}, "json_schema", "object"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_structured_outputs_of_vllm(api, engine, path, given, kind, text):
    asked = {CHAT: {"messages": HI}, "/v1/responses": {"input": "a"}}.get(path, {"prompt": "a"})
    response = api.post(path, {**asked, "structured_outputs": given})
    assert response.status_code == 200, response.text
    grammar = engine.submitted[0].options.sampling.grammar
    assert kind in (None, grammar.kind)
    assert text in grammar.text


def test_structured_outputs_ask_for_one_thing(api):
    given = {"structured_outputs": {"regex": "a", "choice": ["b"]}}
    refused = api.post(CHAT, CHAT_BODY | given)
    assert refused.status_code == 400
    assert refused.json()["param"].startswith("structured_outputs.")


@pytest.mark.parametrize("place", [{"output_config": None}, {"output_format": None}])
def test_the_format_of_an_anthropic_answer(api, engine, place):
    wanted = {"type": "json_schema", "schema": SCHEMA}
    (name,) = place
    body = {name: {"format": wanted} if name == "output_config" else wanted}
    assert api.post("/v1/messages", CHAT_BODY | body).status_code == 200
    assert json.loads(engine.submitted[0].options.sampling.grammar.text)["required"] == ["a"]
    both = {"output_config": {"format": wanted}, "output_format": {**wanted, "schema": {}}}
    assert api.post("/v1/messages", CHAT_BODY | both).status_code == 400


def test_the_effort_of_an_anthropic_request_reaches_a_template_that_knows_it(api_with, prompt_of):
    from sapwood.text.template import ChatTemplate

    template = ChatTemplate("{{ reasoning_effort }}: {{ messages[0].content }}")
    api = api_with(**changes(None, "qwen3") | {"template": template})
    body = CHAT_BODY | {"output_config": {"effort": "high"}}
    assert api.post("/v1/messages", body).status_code == 200
    assert prompt_of() == "high: Hi"


@pytest.mark.parametrize("mode", ["auto", "required"])
@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
def test_only_allowed_tools_are_offered(api_with, engine, prompt_of, path, mode):
    api = api_with(**changes("qwen25"))
    nested = tools_of({"alpha": {}, "beta": {}})
    flat = [{"type": "function", "name": name, "parameters": {}} for name in ("alpha", "beta")]
    if path == CHAT:
        one = {"type": "function", "function": {"name": "beta"}}
        allowed = {"allowed_tools": {"mode": mode, "tools": [one]}}
        body = CHAT_BODY | {"tools": nested}
    else:
        allowed = {"mode": mode, "tools": [{"type": "function", "name": "beta"}]}
        body = {"input": "Hi", "tools": flat}
    # What the scripted model writes need not match the grammar that is asked of the engine.
    api.post(path, body | {"tool_choice": {"type": "allowed_tools", **allowed}})
    assert "beta" in prompt_of()
    assert "alpha" not in prompt_of()
    grammar = engine.submitted[0].options.sampling.grammar
    assert (grammar is not None and "beta" in grammar.text) is (mode == "required")


def test_special_tokens_of_the_tokenizer(services, api, engine, monkeypatch):
    asked = []
    encode = services.generator.encode

    async def noted(text, add_special_tokens=True, *others, **named):
        asked.append(add_special_tokens)
        return await encode(text, add_special_tokens, *others, **named)

    monkeypatch.setattr(services.generator, "encode", noted)
    for extra in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
        assert api.post(CHAT, CHAT_BODY | extra).status_code == 200
        assert api.post("/v1/completions", {"prompt": "a", **extra}).status_code == 200
    assert asked == [False, True, True, True, False, False]


def test_other_names_of_honoured_fields(api, engine):
    names = {"n_predict": 7, "repeat_penalty": 1.5, "include_stop_str_in_output": True}
    asked = {"messages": HI, "request_id": "mine", "repeat_last_n": 64, **names}
    answer = api.post(CHAT, asked)
    assert answer.json()["id"] == "mine"
    sampling = engine.submitted[0].options.sampling
    assert (sampling.max_new_tokens, sampling.repetition_penalty) == (7, 1.5)
    assert (sampling.no_stop_trim, sampling.penalty_window) == (True, 64)
    refused = api.post(CHAT, {"messages": HI, "n_predict": 7, "max_tokens": 8})
    assert (refused.status_code, refused.json()["param"]) == (400, "n_predict")


def test_a_response_passes_on_its_bias_of_tokens(api, engine):
    asked = {"input": "a", "logit_bias": {"7": "1.5"}, "skip_special_tokens": False}
    assert api.post("/v1/responses", asked).status_code == 200
    assert engine.submitted[0].options.sampling.logit_bias == {7: 1.5}
    assert engine.submitted[0].options.sampling.skip_special_tokens is False


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        (CHAT, CHAT_BODY | {"custom_params": {"a": 1}}, "custom_params"),
        (
            "/generate",
            {"text": "a", "sampling_params": {"custom_params": {"a": 1}}},
            "sampling_params.custom_params",
        ),
    ],
)
def test_parameters_of_no_processor_are_refused(api, warns, engine, path, body, name):
    """Review 2, number 9."""
    refused = api.post(path, body)
    error = refused.json()
    assert (refused.status_code, error.get("error", error)["param"]) == (400, name)
    answered = warns.post(path, body)
    assert (answered.status_code, answered.headers[HEADER]) == (200, name)
    assert engine.submitted[-1].options.sampling.custom_params == {}


def test_reasoning_of_openais_servers_with_its_text_is_taken(api, prompt_of):
    item = {
        "type": "reasoning",
        "summary": [],
        "encrypted_content": "gAAA",
        "content": [{"type": "reasoning_text", "text": "Hm."}],
    }
    asked = {"input": [item, {"role": "user", "content": "Go on."}]}
    assert api.post("/v1/responses", asked).status_code == 200


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_ollama(api, path, stream):
    body = {"messages": HI} if path == "/api/chat" else {"prompt": "Hi"}
    asked = {**body, "stream": stream, "logprobs": True, "top_logprobs": 2}
    answer = api.post(path, asked)
    assert answer.status_code == 200, answer.text
    objects = [json.loads(line) for line in answer.text.splitlines()]
    entries = [entry for one in objects for entry in one.get("logprobs", [])]
    text = "".join(
        one["message"]["content"] if path == "/api/chat" else one["response"] for one in objects
    )
    # The end of the answer is a token too.
    written = b"".join(bytes(entry["bytes"]) for entry in entries[: len(text.encode())])
    assert written == text.encode() == "Hello, wörld!".encode()
    for entry in entries:
        assert entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 2
    without = api.post(path, {**body, "stream": stream, "top_logprobs": 2})
    assert "logprobs" not in without.text


def test_the_window_of_ollamas_penalties(api, engine):
    options = {"repeat_last_n": 64, "repeat_penalty": 1.1}
    assert api.post("/api/chat", {"messages": HI, "options": options}).status_code == 200
    assert engine.submitted[0].options.sampling.penalty_window == 64


def test_all_tokens_in_the_words_of_vllm_and_llama_cpp(api, engine):
    assert api.post(CHAT, {"messages": HI, "top_k": 0, "max_tokens": -1}).status_code == 200
    sampling = engine.submitted[0].options.sampling
    assert (sampling.top_k, sampling.max_new_tokens) == (-1, None)


def test_a_long_unknown_name_costs_no_time_for_similar_names(monkeypatch):
    import difflib

    from sapwood.base.errors import InvalidRequest
    from sapwood.schema.fields import parse

    looked_for = []
    similar = difflib.get_close_matches
    monkeypatch.setattr(
        difflib,
        "get_close_matches",
        lambda name, *a, **k: looked_for.append(name) or similar(name, *a, **k),
    )
    for name in ("temperatur", "x" * 10_000_000):
        with pytest.raises(InvalidRequest, match="unknown field"):
            parse({"messages": HI, name: 1}, openai.CHAT_FIELDS)
    assert looked_for == ["temperatur"]
