"""Tools with the default model, whose chat template has no place for them, in every dialect."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import jsonschema
import ollama
import openai
import pytest

from sapwood import LLM
from sapwood.store import ModelFiles
from tests.e2e.server import Server

MODEL = "smollm2-135m"

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 30}},
    "required": ["city"],
    "additionalProperties": False,
}
ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": [1, 2, 3]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
SCHEMAS = {"get_weather": WEATHER, "add": ADD}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"{name}!", "parameters": one}}
    for name, one in SCHEMAS.items()
]
QUESTION = {"role": "user", "content": "What is the weather in Berlin?"}


def called(city: str, call_id: str) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
    call = {"id": call_id, "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def turn(city: str, weather: str) -> list[dict[str, Any]]:
    """A question, the call, its result and the answer."""
    return [
        {"role": "user", "content": f"What is the weather in {city}?"},
        called(city, city),
        {"role": "tool", "tool_call_id": city, "content": weather},
        {"role": "assistant", "content": f"{city}: {weather}."},
    ]


SHOWN_HOW = [
    *turn("Paris", "18 degrees, sunny"),
    *turn("Oslo", "3 degrees, snow"),
    *turn("Rome", "25 degrees, clear"),
    *turn("Lima", "20 degrees, fog"),
]
"""So small a model calls by itself only what it has seen before."""


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def ask(client: openai.OpenAI, *messages: dict[str, Any], stream: bool, **options: Any) -> Any:
    """(content, calls, why it ended) of a chat, as the official client reads them."""
    asked: dict[str, Any] = {"model": MODEL, "messages": messages, "tools": TOOLS}
    asked |= {"temperature": 0, "max_tokens": 100, **options}
    if stream:
        with client.chat.completions.stream(**asked) as events:
            answer = events.get_final_completion()
    else:
        answer = client.chat.completions.create(**asked)
    (choice,) = answer.choices
    message = choice.message
    calls = [(one.function.name, one.function.arguments) for one in message.tool_calls or []]
    return message.content or "", calls, choice.finish_reason


def check(calls: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """The arguments of valid calls."""
    assert calls
    found = []
    for name, arguments in calls:
        found.append(json.loads(arguments))
        jsonschema.validate(found[-1], SCHEMAS[name])
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_required_call_is_a_valid_one(
    client: openai.OpenAI, stream: bool, temperature: float
) -> None:
    options = {"tool_choice": "required", "parallel_tool_calls": False, "seed": 7}
    options |= {"temperature": temperature, "max_tokens": 200}
    content, calls, reason = ask(client, QUESTION, stream=stream, **options)
    check(calls)
    assert (content, len(calls), reason) == ("", 1, "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
def test_the_named_tool_is_called(client: openai.OpenAI, stream: bool) -> None:
    choice = {"type": "function", "function": {"name": "add"}}
    content, calls, reason = ask(client, QUESTION, stream=stream, tool_choice=choice)
    assert [name for name, _ in calls] == ["add"]
    check(calls)
    assert (content, reason) == ("", "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
def test_by_itself_it_calls_or_answers(client: openai.OpenAI, stream: bool) -> None:
    content, calls, reason = ask(client, *SHOWN_HOW, QUESTION, stream=stream)
    assert check(calls) == [{"city": "Berlin"}]
    assert (content, reason) == ("", "tool_calls")
    capital = {"role": "user", "content": "What is the capital of Japan?"}
    content, calls, reason = ask(client, capital, stream=stream)
    assert "Tokyo" in content
    assert (calls, reason) == ([], "stop")


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_a_result_of_the_turn_before_is_told(client: openai.OpenAI, choice: str) -> None:
    result = {"role": "tool", "tool_call_id": "1", "content": "11 degrees, rain"}
    turns = [*SHOWN_HOW, QUESTION, called("Berlin", "1"), result]
    content, calls, _ = ask(client, *turns, stream=False, tool_choice=choice)
    assert "11 degrees" in content
    assert calls == []


def test_strict_tools_and_samples(client: openai.OpenAI) -> None:
    strict = [{**one, "function": {**one["function"], "strict": True}} for one in TOOLS]
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[*SHOWN_HOW, QUESTION],
        tools=strict,
        n=3,
        seed=3,
        temperature=0.7,
        max_tokens=100,
    )
    calls = [one for choice in answer.choices for one in choice.message.tool_calls or []]
    check([(one.function.name, one.function.arguments) for one in calls])


def test_beside_a_response_format_it_calls_or_answers_so(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"sky": {"enum": ["blue", "grey"]}}}
    schema |= {"required": ["sky"], "additionalProperties": False}
    named = {"name": "sky", "schema": schema}
    shape = {"response_format": {"type": "json_schema", "json_schema": named}}
    _, calls, _ = ask(client, *SHOWN_HOW, QUESTION, stream=False, **shape)
    assert check(calls) == [{"city": "Berlin"}]
    first = {"role": "user", "content": "What colour is the sky? Answer as JSON."}
    content, calls, _ = ask(client, first, stream=False, **shape)
    if calls:
        check(calls)
    else:
        jsonschema.validate(json.loads(content), schema)


def test_responses(client: openai.OpenAI) -> None:
    tools = [{"type": "function", "name": "add", "parameters": ADD, "strict": False}]
    asked: dict[str, Any] = {"model": MODEL, "tools": tools, "temperature": 0}
    asked |= {"max_output_tokens": 100}
    first = client.responses.create(input="Add 1 and 2.", tool_choice="required", **asked)
    item = next(one for one in first.output if one.type == "function_call")
    check([(item.name, item.arguments)])
    result = {"type": "function_call_output", "call_id": item.call_id, "output": "3"}
    second = client.responses.create(
        input=[result], previous_response_id=first.id, tool_choice="none", **asked
    )
    assert second.output_text


@pytest.mark.parametrize("stream", [False, True])
def test_anthropics_dialect(server: Server, stream: bool) -> None:
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 100, "messages": [QUESTION]}
    asked["tools"] = [{"name": name, "input_schema": one} for name, one in SCHEMAS.items()]
    asked["tool_choice"] = {"type": "tool", "name": "get_weather"}
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        if stream:
            with client.messages.stream(**asked) as events:
                answer = events.get_final_message()
        else:
            answer = client.messages.create(**asked)
        (block,) = answer.content
        assert block.type == "tool_use"
        jsonschema.validate(block.input, WEATHER)
        assert answer.stop_reason == "tool_use"
        result = {"type": "tool_result", "tool_use_id": block.id, "content": "11 degrees"}
        said = {"role": "assistant", "content": [block.model_dump(exclude_none=True)]}
        asked["messages"] = [QUESTION, said, {"role": "user", "content": [result]}]
        asked["tool_choice"] = {"type": "none"}
        (block,) = client.messages.create(**asked).content
        assert block.type == "text"


def test_ollamas_dialect(server: Server) -> None:
    with ollama.Client(host=server.url) as client:
        assert "tools" in client.show(MODEL).capabilities
        calls = [{"function": {"name": "get_weather", "arguments": {"city": "Berlin"}}}]
        result = {"role": "tool", "tool_name": "get_weather", "content": "11 degrees, rain"}
        messages = [QUESTION, {"role": "assistant", "content": "", "tool_calls": calls}, result]
        options = {"temperature": 0, "num_predict": 40}
        answer = client.chat(MODEL, messages, tools=TOOLS, options=options)
        # What so small a model says of the result differs from processor to processor.
        assert answer.message.content or answer.message.tool_calls


def test_the_python_api(smollm2_files: ModelFiles) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 100}
    with LLM(smollm2_files.name, max_total_tokens=4096) as llm:
        [forced] = llm.chat([QUESTION], sampling, tools=TOOLS, tool_choice="required")
        [free] = llm.chat([*SHOWN_HOW, QUESTION], sampling, tools=TOOLS)
    for result in (forced, free):
        assert result.answer is not None
        check([(one.name, one.arguments) for one in result.answer.calls])


def test_it_is_said_how_calls_are_read(server: Server, client: openai.OpenAI) -> None:
    decision = "tool_call_parser = generic (the chat template has no place for tools)"
    assert f"resolved: {decision}" in server.log
    (card,) = client.models.list().data
    assert card.model_dump()["tool_call_parser"] == "generic"
