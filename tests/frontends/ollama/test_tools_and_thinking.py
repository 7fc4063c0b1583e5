"""Tools and thinking as Ollama's clients have them."""

from __future__ import annotations

import json

import pytest

from tests.frontends.chats import changes, tools_of, without_place
from tests.text.tools.samples import TOOLS

CHAT, GENERATE = "/api/chat", "/api/generate"
MESSAGES = [{"role": "user", "content": "Weather?"}]
WEATHER = tools_of({"get_weather": TOOLS["get_weather"]})
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture
def chat(api_with):
    return api_with(**changes("qwen25", "qwen3"))


def lines(response):
    return [json.loads(line) for line in response.text.splitlines()]


def test_a_whole_answer(chat, engine):
    engine.reply = f"<think>\nHm.\n</think>\n\nI look.\n{CALL}"
    body = {"messages": MESSAGES, "tools": WEATHER, "stream": False}
    message = chat.post(CHAT, body).json()["message"]
    [call] = message.pop("tool_calls")
    assert call["function"] == {"name": "get_weather", "arguments": {"city": "Paris"}}
    assert message == {"role": "assistant", "content": "I look.", "thinking": "Hm."}


def test_a_stream_tells_calls_whole(chat, engine):
    engine.reply = f"<think>\nHm.\n</think>\n\nI look.\n{CALL}\n{CALL}"
    got = lines(chat.post(CHAT, {"messages": MESSAGES, "tools": WEATHER}))
    messages = [line["message"] for line in got]
    assert "".join(one.get("thinking", "") for one in messages) == "Hm."
    assert "".join(one["content"] for one in messages) == "I look."
    calls = [call["function"] for one in messages for call in one.get("tool_calls", [])]
    assert calls == [{"name": "get_weather", "arguments": {"city": "Paris"}}] * 2
    assert [line["done"] for line in got] == [False] * (len(got) - 1) + [True]


def test_generate_tells_thinking(chat, engine):
    engine.reply = "<think>\nHm.\n</think>\n\nHi."
    answer = chat.post(GENERATE, {"prompt": "x", "stream": False}).json()
    assert (answer["response"], answer["thinking"]) == ("Hi.", "Hm.")


@pytest.mark.parametrize("think", [False, True, "high"])
def test_think(chat, prompt_of, think):
    assert chat.post(CHAT, {"messages": MESSAGES, "think": think}).status_code == 200
    assert prompt_of().endswith("</think>\n\n") is (think is False)


def test_a_history_with_calls_and_results(chat, prompt_of):
    function = {"name": "get_weather", "arguments": {"city": "Paris"}}
    history = [
        *MESSAGES,
        {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
        {"role": "tool", "tool_name": "get_weather", "content": "sunny"},
    ]
    assert chat.post(CHAT, {"messages": history, "tools": WEATHER}).status_code == 200
    assert '{"name": "get_weather", "arguments": {"city": "Paris"}}' in prompt_of()
    assert "<tool_response>\nsunny\n</tool_response>" in prompt_of()


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"think": "enormous"}, "think"),
        (
            {"messages": [*MESSAGES, {"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "messages[1].tool_calls[0].function",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(chat, engine, extra, named):
    refused = chat.post(CHAT, {"messages": MESSAGES, **extra})
    assert refused.status_code == 400
    assert named in refused.json()["error"]
    assert engine.submitted == []


def test_show_tells_what_the_model_can(chat, api):
    show = "/api/show"
    assert chat.post(show, {"model": "org/tiny"}).json()["capabilities"] == [
        "completion",
        "tools",
        "thinking",
    ]
    assert api.post(show, {"model": "org/tiny"}).json()["capabilities"] == ["completion"]


def test_a_template_without_a_place_for_tools(api_with, engine, prompt_of):
    api = api_with(**without_place())
    shown = api.post("/api/show", {"model": "org/tiny"}).json()
    assert shown["capabilities"] == ["completion", "tools"]
    call = '[{"name": "get_weather", "arguments": {"city": "Paris"}}]'
    engine.reply = f"I look.\n<tool_call>{call}</tool_call>"
    got = lines(api.post(CHAT, {"messages": MESSAGES, "tools": WEATHER}))
    calls = [one["function"] for line in got for one in line["message"].get("tool_calls", [])]
    assert calls == [{"name": "get_weather", "arguments": {"city": "Paris"}}]
    said = {"role": "assistant", "content": "I look.", "tool_calls": [{"function": calls[0]}]}
    result = {"role": "tool", "tool_name": "get_weather", "content": "sunny"}
    body = {"messages": [*MESSAGES, said, result], "tools": WEATHER, "stream": False}
    engine.reply = "Sunny."
    assert api.post(CHAT, body).json()["message"] == {"role": "assistant", "content": "Sunny."}
    assert f"I look.\n<tool_call>{call}</tool_call><|im_end|>" in prompt_of()
    assert "The function get_weather returned:\nsunny" in prompt_of()
