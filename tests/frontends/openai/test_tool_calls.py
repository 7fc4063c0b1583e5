"""Tools through the chat route: what the engine is asked, and what clients get."""

from __future__ import annotations

import json

import pytest

from sapwood.text.template import ChatTemplate
from tests.frontends.chats import (
    SHORT_TEMPLATE,
    changes,
    read_stream,
    read_whole,
    tools_of,
    without_place,
)
from tests.text import chat_templates as families
from tests.text.tools.samples import TOOLS, samples_of
from tests.text.tools.spelling import SPELLERS
from tests.tiers import long_only

URL = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Weather?"}]
WEATHER = tools_of({"get_weather": TOOLS["get_weather"]})
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture
def chat(api_with):
    """A model that calls as Qwen does."""
    return api_with(**changes("qwen25"))


def ask(**extra):
    return {"messages": MESSAGES, "tools": WEATHER, **extra}


@pytest.mark.parametrize("name", sorted(SPELLERS))
@pytest.mark.parametrize("step", [4, *long_only(1)])
def test_the_official_clients_stream_gives_the_same_calls_as_a_whole_answer(
    api_with, engine, name, step
):
    app = api_with(**changes(name) | {"template": ChatTemplate(SHORT_TEMPLATE)}).app
    body = {"messages": MESSAGES, "tools": tools_of(TOOLS), "tool_choice": "auto"}
    if name == "json_array":
        body["tool_choice"] = "required"
    for sample in samples_of(name)[::step]:
        engine.reply = sample.text
        whole = read_whole(app, **body)
        assert whole["calls"] == list(sample.calls), sample.label
        assert whole["content"] == sample.content, sample.label
        assert whole["finish_reason"] == "tool_calls"
        assert read_stream(app, **body) == whole, sample.label


def test_a_call_as_a_whole_answer(chat, engine, prompt_of):
    engine.reply = f"Let me see.\n{CALL}"
    choice = chat.post(URL, ask()).json()["choices"][0]
    [call] = choice["message"]["tool_calls"]
    assert call.pop("id").startswith("call_")
    function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    assert call == {"type": "function", "function": function}
    assert choice["message"]["content"] == "Let me see."
    assert (choice["finish_reason"], choice["logprobs"]) == ("tool_calls", None)
    assert '"name": "get_weather"' in prompt_of()


def test_content_is_null_beside_calls_alone(chat, engine):
    engine.reply = CALL
    assert chat.post(URL, ask()).json()["choices"][0]["message"]["content"] is None


def test_the_events_of_a_call(chat, engine, events):
    engine.reply = CALL
    got = events(chat.post(URL, ask(stream=True)).text)
    deltas = [event["choices"][0]["delta"] for event in got]
    assert deltas[0] == {"role": "assistant", "content": ""}
    [start] = deltas[1]["tool_calls"]
    assert start.pop("id")
    function = {"name": "get_weather", "arguments": ""}
    assert start == {"index": 0, "type": "function", "function": function}
    pieces = [delta["tool_calls"][0] for delta in deltas[2:-1]]
    assert len(pieces) > 5
    assert "".join(piece["function"]["arguments"] for piece in pieces) == '{"city": "Paris"}'
    assert deltas[-1] == {}
    assert got[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_broken_call_is_content(chat, engine):
    engine.reply = CALL[:-20]
    read = read_whole(chat.app, **ask())
    assert (read["content"], read["calls"]) == (engine.reply, [])
    assert read["finish_reason"] == "stop"


def test_a_stream_with_a_broken_call_ends_with_its_text(chat, engine, events):
    engine.reply = CALL[:-20]
    got = [event["choices"][0] for event in events(chat.post(URL, ask(stream=True)).text)]
    assert "".join(one["delta"].get("content") or "" for one in got) == engine.reply
    assert got[-1]["finish_reason"] == "stop"
    pieces = [one["delta"]["tool_calls"][0] for one in got if "tool_calls" in one["delta"]]
    with pytest.raises(ValueError, match=r"delimiter|Unterminated"):
        json.loads("".join(piece["function"]["arguments"] for piece in pieces))


def test_several_samples_are_read_apart(chat, engine):
    engine.reply = CALL
    choices = chat.post(URL, ask(n=3)).json()["choices"]
    ids = {choice["message"]["tool_calls"][0]["id"] for choice in choices}
    assert len(ids) == 3


def test_the_length_limit_keeps_its_reason(chat, engine):
    engine.reply = CALL + " and more"
    answer = chat.post(URL, ask(max_tokens=len(CALL) + 4)).json()["choices"][0]
    assert answer["finish_reason"] == "length"
    assert len(answer["message"]["tool_calls"]) == 1


@pytest.mark.parametrize("num_left_out", [15, 20, 24])
def test_a_call_that_the_length_limit_cuts_off_is_the_same_streamed_and_whole(
    chat, engine, events, num_left_out
):
    engine.reply = "I see. " + CALL
    limit = {"max_tokens": len(engine.reply) - num_left_out}
    choice = chat.post(URL, ask(**limit)).json()["choices"][0]
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert '{"city": "Paris"}'.startswith(call["function"]["arguments"])
    with pytest.raises(ValueError, match=r"delimiter|Unterminated|Expecting"):
        json.loads(call["function"]["arguments"])
    assert (choice["message"]["content"], choice["finish_reason"]) == ("I see.", "length")
    got = [event["choices"][0] for event in events(chat.post(URL, ask(stream=True, **limit)).text)]
    deltas = [one["delta"] for one in got]
    pieces = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert [piece["index"] for piece in pieces if "id" in piece] == [0]
    streamed = "".join(piece["function"]["arguments"] for piece in pieces)
    assert streamed == call["function"]["arguments"]
    assert "".join(delta.get("content") or "" for delta in deltas) == "I see."
    assert got[-1]["finish_reason"] == "length"


def test_no_tool_choice_leaves_tools_out(chat, engine, prompt_of):
    engine.reply = CALL
    message = chat.post(URL, ask(tool_choice="none")).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": CALL}
    assert "get_weather" not in prompt_of()


def grammar_of(engine):
    return engine.submitted[-1].options.sampling.grammar


@pytest.mark.parametrize(
    ("choice", "extra", "limit"),
    [
        ("required", {}, None),
        ("required", {"parallel_tool_calls": False}, 1),
        ({"type": "function", "function": {"name": "now"}}, {}, 1),
    ],
)
def test_a_call_that_is_required_is_held_to_a_grammar(api_with, engine, choice, extra, limit):
    chat = api_with(**changes("qwen25") | {"template": ChatTemplate(SHORT_TEMPLATE)})
    engine.reply = '[{"name": "now", "parameters": {}}]'
    body = {"messages": MESSAGES, "tools": tools_of(TOOLS), "tool_choice": choice, **extra}
    answer = chat.post(URL, body).json()["choices"][0]
    assert answer["message"]["tool_calls"][0]["function"]["name"] == "now"
    schema = json.loads(grammar_of(engine).text)
    assert (schema["type"], schema.get("maxItems")) == ("array", limit)
    names = [one["properties"]["name"]["const"] for one in schema["items"].get("anyOf", [])]
    assert names == (list(TOOLS) if choice == "required" else [])


def test_parser_none_leaves_calls_in_the_text(api_with, engine, prompt_of):
    engine.reply = CALL
    api = api_with(**changes())
    assert api.post(URL, ask()).json()["choices"][0]["message"]["content"] == CALL
    assert "get_weather" in prompt_of()
    engine.reply = '[{"name": "get_weather", "parameters": {"city": "Paris"}}]'
    answer = api.post(URL, ask(tool_choice="required")).json()["choices"][0]
    assert answer["finish_reason"] == "tool_calls"


def test_without_parallel_calls_the_second_is_content(chat, engine):
    engine.reply = f"{CALL}\n{CALL}"
    message = chat.post(URL, ask(parallel_tool_calls=False)).json()["choices"][0]["message"]
    assert len(message["tool_calls"]) == 1
    assert message["content"].strip() == CALL


def test_strict_tools_are_held_to_their_schema(chat, engine):
    engine.reply = CALL
    [tool] = WEATHER
    strict = [{**tool, "function": {**tool["function"], "strict": True}}, *tools_of({"now": {}})]
    assert chat.post(URL, ask(tools=strict)).status_code == 200
    form = json.loads(grammar_of(engine).text)["format"]
    assert form["triggers"] == ["<tool_call>"]
    first, second = form["tags"]
    assert first["begin"] == '<tool_call>\n{"name": "get_weather", "arguments": '
    assert first["content"]["json_schema"] == TOOLS["get_weather"]
    assert second["content"]["json_schema"] == {"type": "object"}


def test_beside_a_response_format_the_model_calls_or_answers_so(chat, engine):
    assert chat.post(URL, ask(response_format={"type": "json_object"})).status_code == 200
    form = json.loads(engine.submitted[-1].options.sampling.grammar.text)["format"]
    assert form["type"] == "or"
    answer, calls = form["elements"]
    assert answer == {"type": "json_schema", "json_schema": {"type": "object"}}
    assert calls["tags"][0]["begin"].startswith('<tool_call>\n{"name": "get_weather"')
    assert (calls["at_least_one"], calls["stop_after_first"]) == (True, False)


def test_a_required_call_leaves_nothing_for_a_response_format_to_say(chat, engine):
    alone = ask(tool_choice="required")
    grammars = []
    for body in (alone, {**alone, "response_format": {"type": "json_object"}}):
        assert chat.post(URL, body).status_code == 200
        grammars.append(engine.submitted[-1].options.sampling.grammar)
    assert grammars[0] == grammars[1]


@pytest.mark.parametrize("parser", ["qwen3_coder", "pythonic"])
def test_a_response_format_beside_calls_that_no_grammar_follows_is_refused(api_with, parser):
    body = ask(response_format={"type": "json_object"})
    refused = api_with(**changes(parser)).post(URL, body)
    assert (refused.status_code, refused.json()["param"]) == (400, "tools")
    assert "tool_choice" in refused.json()["message"]


def test_strict_tools_of_a_format_without_json_are_refused(api_with, engine):
    [tool] = WEATHER
    strict = [{**tool, "function": {**tool["function"], "strict": True}}]
    refused = api_with(**changes("qwen3_coder")).post(URL, ask(tools=strict))
    assert (refused.status_code, refused.json()["param"]) == (400, "tools")
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": ["x"]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": tools_of({"a b": {}})}, "tools"),
        ({"tools": [*WEATHER, *WEATHER]}, "tools"),
        ({"tools": [{**WEATHER[0], "colour": 1}]}, "tools[0].colour"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "auto",
                        "tools": [{"type": "function", "function": {"name": "nope"}}],
                    },
                }
            },
            "tool_choice.allowed_tools",
        ),
        ({"tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"ebnf": 'root ::= "a"'}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
    ],
)
def test_what_cannot_be_is_refused_by_name(chat, engine, extra, param):
    refused = chat.post(URL, ask(**extra))
    assert (refused.status_code, refused.json()["param"]) == (400, param)
    assert engine.submitted == []


def test_a_history_with_calls_goes_through_the_template(chat, prompt_of):
    function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    history = [
        *MESSAGES,
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "sunny"}]},
    ]
    assert chat.post(URL, ask(messages=history)).status_code == 200
    assert '{"name": "get_weather", "arguments": {"city": "Paris"}}' in prompt_of()
    assert "<tool_response>\nsunny\n</tool_response>" in prompt_of()


def test_tags_that_are_special_tokens_are_kept_in_the_text(services, engine, api_with, tokenizer):
    assert api_with(**changes("qwen25")).post(URL, ask()).status_code == 200
    assert engine.submitted[-1].options.sampling.skip_special_tokens is True
    special = type(tokenizer).__new__(type(tokenizer))
    special.__dict__.update(vars(tokenizer))
    special.special_token_texts = frozenset({"<tool_call>"})
    api = api_with(**changes("qwen25"), tokenizer=special)
    assert api.post(URL, ask()).status_code == 200
    assert engine.submitted[-1].options.sampling.skip_special_tokens is False
    [tool] = WEATHER
    strict = [{**tool, "function": {**tool["function"], "strict": True}}]
    assert api.post(URL, ask(tools=strict)).status_code == 400


# ---- templates without a place for tools --------------------------------------------------------

GENERIC_CALL = '<tool_call>[{"name": "get_weather", "arguments": {"city": "Paris"}}]</tool_call>'


@pytest.fixture
def untaught(api_with):
    """A model whose template has no place for tools."""
    return api_with(**without_place())


def test_a_template_without_a_place_gets_the_tools_as_text(untaught, engine, prompt_of):
    engine.reply = f"Let me see.\n{GENERIC_CALL}"
    for read in (read_whole, read_stream):
        got = read(untaught.app, **ask())
        assert got["calls"] == [("get_weather", {"city": "Paris"})]
        assert got["content"] == "Let me see."
        assert got["finish_reason"] == "tool_calls"
    prompt = prompt_of()
    assert prompt.startswith("<|im_start|>system\nYou can call functions")
    assert '{"name": "get_weather", "parameters": {"type": "object", "properties"' in prompt
    assert prompt.endswith("<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n")
    engine.reply = "Just rain."
    for read in (read_whole, read_stream):
        got = read(untaught.app, **ask())
        assert (got["content"], got["calls"], got["finish_reason"]) == ("Just rain.", [], "stop")


def test_several_calls_and_samples_without_a_place(untaught, engine):
    calls = [("get_weather", {"city": "Paris"}), ("now", {})]
    engine.reply = SPELLERS["generic"][0](calls)
    tools = tools_of({name: TOOLS[name] for name, _ in calls})
    choices = untaught.post(URL, ask(tools=tools, n=2)).json()["choices"]
    assert len(choices) == 2
    for choice in choices:
        names = [call["function"]["name"] for call in choice["message"]["tool_calls"]]
        assert names == ["get_weather", "now"]
    one = ask(tools=tools, parallel_tool_calls=False)
    message = untaught.post(URL, one).json()["choices"][0]["message"]
    assert len(message["tool_calls"]) == 1
    assert '"now"' in message["content"]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_required_calls_without_a_place(untaught, engine, prompt_of, choice):
    engine.reply = '[{"name": "get_weather", "parameters": {"city": "Paris"}}]'
    for read in (read_whole, read_stream):
        got = read(untaught.app, **ask(tool_choice=choice))
        assert got["calls"] == [("get_weather", {"city": "Paris"})]
    assert json.loads(grammar_of(engine).text)["type"] == "array"
    assert "You can call functions" in prompt_of()


HISTORY = [
    {"role": "system", "content": "Be brief."},
    *MESSAGES,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "sunny"},
]


@pytest.mark.parametrize("choice", ["auto", "none", "required"])
def test_the_turn_after_a_call_without_a_place(untaught, engine, prompt_of, choice):
    engine.reply = "[]" if choice == "required" else "Sunny."
    answer = untaught.post(URL, ask(messages=HISTORY, tool_choice=choice))
    assert answer.status_code == 200
    prompt = prompt_of()
    assert f"<|im_start|>assistant\n{GENERIC_CALL}<|im_end|>" in prompt
    result = "The function get_weather returned:\nsunny"
    assert f"<|im_start|>user\n{result}<|im_end|>" in prompt
    assert ("You can call functions" in prompt) is (choice != "none")
    assert prompt.startswith("<|im_start|>system\nBe brief.")


@pytest.mark.parametrize("family", ["Gemma 2", "Mistral 7B"])
def test_templates_without_system_and_with_roles_in_turn(api_with, engine, prompt_of, family):
    api = api_with(**without_place(families.WITHOUT_PLACE[family]))
    engine.reply = GENERIC_CALL
    [first] = read_whole(api.app, **ask())["calls"]
    assert first == ("get_weather", {"city": "Paris"})
    assert prompt_of().index("You can call functions") < prompt_of().index("Weather?")
    engine.reply = "Sunny."
    assert read_whole(api.app, **ask(messages=HISTORY[1:]))["content"] == "Sunny."


def test_strict_tools_without_a_place(untaught, engine):
    [tool] = WEATHER
    body = ask(tools=[{**tool, "function": {**tool["function"], "strict": True}}])
    engine.reply = GENERIC_CALL
    assert len(read_whole(untaught.app, **body)["calls"]) == 1
    form = json.loads(grammar_of(engine).text)["format"]
    assert form["triggers"] == ["<tool_call>"]
    assert form["tags"][0]["begin"] == '<tool_call>[{"name": "get_weather", "arguments": '
    # The grammar does not see a call without tags.
    engine.reply = '{"name": "get_weather", "arguments": {"city": 5}}'
    got = read_whole(untaught.app, **body)
    assert (got["content"], got["calls"]) == (engine.reply, [])
    del body["tools"][0]["function"]["strict"]
    assert len(read_whole(untaught.app, **body)["calls"]) == 1


def test_a_response_format_without_a_place(untaught, engine):
    engine.reply = GENERIC_CALL
    body = ask(response_format={"type": "json_object"})
    assert len(read_whole(untaught.app, **body)["calls"]) == 1
    form = json.loads(grammar_of(engine).text)["format"]
    assert form["elements"][1]["tags"][0]["begin"].startswith("<tool_call>[{")


def test_thinking_without_a_place(api_with, engine):
    api = api_with(**without_place(reasoning="qwen3"))
    engine.reply = f"<think>\nHm, {GENERIC_CALL}?\n</think>\n\n{GENERIC_CALL}"
    for read in (read_whole, read_stream):
        got = read(api.app, **ask())
        assert got["reasoning"] == f"Hm, {GENERIC_CALL}?"
        assert got["calls"] == [("get_weather", {"city": "Paris"})]


def test_the_generic_format_by_name_goes_before_the_templates_own(api_with, engine, prompt_of):
    api = api_with(**changes("generic"))
    engine.reply = GENERIC_CALL
    assert len(read_whole(api.app, **ask(messages=HISTORY))["calls"]) == 1
    assert "You can call functions" in prompt_of()
    assert GENERIC_CALL in prompt_of()


def test_a_history_that_cannot_be_spelled_is_refused(untaught, engine):
    messages = [*MESSAGES, {"role": "assistant", "tool_calls": [{"function": {"name": 5}}, {}]}]
    refused = untaught.post(URL, ask(messages=messages))
    assert refused.status_code == 400
    assert refused.json()["param"] == "messages[1].tool_calls[1]"
    assert engine.submitted == []


def test_where_the_choice_of_a_parser_is_told(untaught):
    assert untaught.get("/v1/models").json()["data"][0]["tool_call_parser"] == "generic"
    info = untaught.get("/server_info").json()
    assert (info["tool_call_parser"], info["reasoning_parser"]) == ("generic", "none")
    assert info["notes"][1:] == [
        "tool_call_parser = generic (the chat template has no place for tools)",
        "reasoning_parser = none (the chat template shows no thinking)",
    ]
