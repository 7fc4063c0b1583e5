"""tool_use and thinking blocks, whole and streamed, as Anthropic's own client reads them."""

from __future__ import annotations

import json
from dataclasses import replace

import anthropic
import pytest

from sapwood.frontends.server import create_app
from sapwood.text.template import ChatTemplate
from tests.frontends.chats import SHORT_TEMPLATE, changes, without_place
from tests.frontends.conftest import Live
from tests.text import chat_templates as families
from tests.text.tools.samples import TOOLS, samples_of
from tests.tiers import long_only

PATH = "/v1/messages"
MESSAGES = [{"role": "user", "content": "Weather?"}]
WEATHER = {"name": "get_weather", "input_schema": TOOLS["get_weather"]}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture
def chat(api_with):
    return api_with(**changes("qwen25", "qwen3"))


def ask(**extra):
    return {"model": "org/tiny", "max_tokens": 500, "messages": MESSAGES, **extra}


@pytest.fixture
def live_with(services):
    """The address of a server whose services differ in some fields."""
    servers = []

    def start(**fields):
        servers.append(Live(create_app(replace(services, **fields))))
        return servers[-1].url

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def url(live_with):
    return live_with(**changes("qwen25", "qwen3"))


def read(url, *, stream, **body):
    """(blocks, stop_reason) as the official client sees them."""
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        if stream:
            with client.messages.stream(**body) as events:
                answer = events.get_final_message()
        else:
            answer = client.messages.create(**body)
    return [_plain(block) for block in answer.content], answer.stop_reason


def _plain(block):
    if block.type == "tool_use":
        return (block.name, block.input)
    return (block.type, block.thinking if block.type == "thinking" else block.text)


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_text_and_calls_are_blocks(url, engine, stream):
    engine.reply = f"<think>\nHm.\n</think>\n\nLet me see.\n{CALL}\n{CALL}"
    blocks, stop_reason = read(url, stream=stream, **ask(tools=[WEATHER]))
    call = ("get_weather", {"city": "Paris"})
    assert blocks == [("thinking", "Hm."), ("text", "Let me see."), call, call]
    assert stop_reason == "tool_use"


@pytest.mark.parametrize("stream", [False, True])
def test_a_template_without_a_place_for_tools(live_with, engine, prompt_of, stream):
    url = live_with(**without_place(families.GEMMA_2))
    spelled = '<tool_call>[{"name": "get_weather", "arguments": {"city": "Paris"}}]</tool_call>'
    engine.reply = f"Let me see.\n{spelled}"
    blocks, stop_reason = read(url, stream=stream, **ask(tools=[WEATHER]))
    assert blocks == [("text", "Let me see."), ("get_weather", {"city": "Paris"})]
    assert stop_reason == "tool_use"
    called = {"type": "tool_use", "id": "1", "name": "get_weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": "rain", "is_error": True}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": [called]},
        {"role": "user", "content": [result, {"type": "text", "text": "Well?"}]},
    ]
    engine.reply = "It failed."
    blocks, _ = read(url, stream=stream, **ask(tools=[WEATHER], messages=messages))
    assert blocks == [("text", "It failed.")]
    assert spelled in prompt_of()
    told = "The function get_weather returned:\nError: rain\n\nWell?"
    assert f"user:{told}<end>" in prompt_of()


@pytest.mark.parametrize("name", ["qwen3_coder", "mistral", "deepseekv31", "gpt-oss"])
@pytest.mark.parametrize("step", [4, *long_only(1)])
def test_streams_give_the_same_calls_as_whole_answers(live_with, engine, name, step):
    url = live_with(**changes(name) | {"template": ChatTemplate(SHORT_TEMPLATE)})
    tools = [{"name": tool, "input_schema": schema} for tool, schema in TOOLS.items()]
    for sample in samples_of(name)[::step]:
        engine.reply = sample.text
        whole = read(url, stream=False, **ask(tools=tools))
        calls = [block for block in whole[0] if block[0] in TOOLS]
        assert calls == list(sample.calls)
        streamed = read(url, stream=True, **ask(tools=tools))
        assert [block for block in streamed[0] if block[0] in TOOLS] == calls
        assert streamed[1] == whole[1] == "tool_use"


@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_call_is_text_and_no_block_of_it_is_begun(url, engine, stream):
    engine.reply = CALL[:-20]
    blocks, stop_reason = read(url, stream=stream, **ask(tools=[WEATHER]))
    assert blocks == [("text", engine.reply)]
    assert stop_reason == "end_turn"


def test_a_history_of_thinking_calls_and_results(chat, prompt_of):
    history = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Paris"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "sunny"},
                {
                    "type": "tool_result",
                    "tool_use_id": "t2",
                    "content": [{"type": "text", "text": "no such city"}],
                    "is_error": True,
                },
                {"type": "text", "text": "And now?"},
            ],
        },
    ]
    assert chat.post(PATH, ask(messages=history, tools=[WEATHER])).status_code == 200
    prompt = prompt_of()
    assert '{"name": "get_weather", "arguments": {"city": "Paris"}}' in prompt
    assert "<tool_response>\nsunny\n</tool_response>" in prompt
    assert "<tool_response>\nError: no such city\n</tool_response>" in prompt
    assert prompt.endswith("<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("choice", "names", "limit"),
    [
        ({"type": "any"}, ["get_weather", "now"], None),
        ({"type": "any", "disable_parallel_tool_use": True}, ["get_weather", "now"], 1),
        ({"type": "tool", "name": "now"}, ["now"], 1),
    ],
)
def test_calls_that_are_required(url, engine, choice, names, limit):
    engine.reply = '[{"name": "now", "parameters": {}}]'
    tools = [WEATHER, {"name": "now", "input_schema": {"type": "object"}}]
    blocks, stop_reason = read(url, stream=True, **ask(tools=tools, tool_choice=choice))
    assert (blocks, stop_reason) == ([("now", {})], "tool_use")
    schema = json.loads(engine.submitted[-1].options.sampling.grammar.text)
    options = schema["items"].get("anyOf", [schema["items"]])
    assert [one["properties"]["name"]["const"] for one in options] == names
    assert schema.get("maxItems") == limit


def test_tool_choice_none_leaves_tools_out(url, engine, prompt_of):
    engine.reply = CALL
    blocks, _ = read(url, stream=False, **ask(tools=[WEATHER], tool_choice={"type": "none"}))
    assert blocks == [("text", CALL)]
    assert "get_weather" not in prompt_of()


def test_thinking_is_turned_on_and_off_and_limited(chat, engine, prompt_of):
    assert chat.post(PATH, ask(thinking={"type": "disabled"})).status_code == 200
    assert prompt_of().endswith("</think>\n\n")
    body = ask(thinking={"type": "enabled", "budget_tokens": 9})
    assert chat.post(PATH, body).status_code == 200
    assert not prompt_of().endswith("</think>\n\n")
    assert engine.submitted[-1].options.sampling.thinking_budget.max_tokens == 9
    assert chat.post(PATH, ask(thinking={"type": "adaptive"})).status_code == 200


def test_counting_counts_the_tools(chat):
    body = {"model": "org/tiny", "messages": MESSAGES}
    counts = [
        chat.post(f"{PATH}/count_tokens", body | extra).json()["input_tokens"]
        for extra in ({}, {"tools": [WEATHER]})
    ]
    assert counts[1] > counts[0] + 100


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [WEATHER, WEATHER]}, "two tools"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"thinking": {"type": "adaptive", "budget_tokens": 5}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": -5}}, "thinking.budget_tokens"),
    ],
)
def test_what_cannot_be_is_refused_by_name(chat, engine, extra, named):
    refused = chat.post(PATH, ask(**extra))
    assert refused.status_code == 400
    assert named in refused.json()["error"]["message"]
    assert engine.submitted == []


def test_a_model_that_does_not_think_says_so(api):
    refused = api.post(PATH, ask(thinking={"type": "enabled", "budget_tokens": 5}))
    assert refused.status_code == 400
    assert "thinking" in refused.json()["error"]["message"]
