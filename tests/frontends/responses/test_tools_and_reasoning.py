"""Calls of functions and thinking, as items of a response."""

from contextlib import contextmanager
from dataclasses import replace

import openai
import pytest

from sapwood.frontends.responses.store import ResponseStore
from sapwood.frontends.server import Stores, create_app
from sapwood.text.formats import AnswerFormats
from sapwood.text.template import ChatTemplate, template_source
from tests.frontends.chats import without_place
from tests.frontends.conftest import Live

TOOL = {
    "type": "function",
    "name": "weather",
    "description": "The weather somewhere.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
REPLY = (
    "<think>Hm.</think>Let me look."
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
)


@contextmanager
def client_of(services):
    store = ResponseStore(None, retention_days=1.0)
    live = Live(create_app(services, stores=Stores(responses=store)))
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client
    live.stop()
    store.close()


@pytest.fixture
def client(services, engine):
    engine.reply = REPLY
    able = replace(
        services,
        template=ChatTemplate(template_source("chatml-tools")),
        formats=AnswerFormats.of_model(
            tool_call_parser="qwen25", reasoning_parser="qwen3", template=None
        ),
    )
    with client_of(able) as one:
        yield one


@pytest.fixture
def untaught(services):
    """Of a model whose template has no place for tools."""
    with client_of(replace(services, **without_place())) as one:
        yield one


def test_an_agent_s_turn_and_the_next(client, engine, prompt_of):
    first = client.responses.create(input="How is it in Paris?", tools=[TOOL])
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
    thought, said, called = first.output
    assert thought.content[0].text == "Hm."
    assert said.content[0].text == "Let me look."
    assert (called.name, called.arguments) == ("weather", '{"city": "Paris"}')
    assert first.usage.output_tokens_details.reasoning_tokens > 0
    assert '"weather"' in prompt_of()
    engine.reply = "<think>So.</think>Rain."
    result = {"type": "function_call_output", "call_id": called.call_id, "output": "rain"}
    second = client.responses.create(input=[result], previous_response_id=first.id, tools=[TOOL])
    assert second.output_text == "Rain."
    assert "rain" in prompt_of()
    assert "Paris" in prompt_of()
    kinds = [item.type for item in client.responses.input_items.list(second.id, order="asc")]
    assert kinds == [
        "message",
        "reasoning",
        "message",
        "function_call",
        "function_call_output",
    ]


def test_a_template_without_a_place_for_tools(untaught, engine, prompt_of):
    spelled = '<tool_call>[{"name": "weather", "arguments": {"city": "Paris"}}]</tool_call>'
    engine.reply = f"Let me look.{spelled}"
    first = untaught.responses.create(input="How is it in Paris?", tools=[TOOL])
    assert [item.type for item in first.output] == ["message", "function_call"]
    assert first.output[1].arguments == '{"city": "Paris"}'
    with untaught.responses.stream(input="Hi", model="org/tiny", tools=[TOOL]) as stream:
        streamed = list(stream)[-1].response
    assert [item.type for item in streamed.output] == ["message", "function_call"]
    engine.reply = "Rain."
    call_id = first.output[1].call_id
    result = {"type": "function_call_output", "call_id": call_id, "output": "rain"}
    second = untaught.responses.create(input=[result], previous_response_id=first.id, tools=[TOOL])
    assert second.output_text == "Rain."
    assert f"Let me look.\n{spelled}<|im_end|>" in prompt_of()
    assert "The function weather returned:\nrain" in prompt_of()


def test_streamed_it_is_the_same(client):
    whole = client.responses.create(input="Hi", tools=[TOOL])
    with client.responses.stream(input="Hi", model="org/tiny", tools=[TOOL]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [item.type for item in final.output] == [item.type for item in whole.output]
    assert final.output[2].arguments == whole.output[2].arguments
    assert final.output_text == whole.output_text
    thinking = [e.delta for e in events if e.type == "response.reasoning_text.delta"]
    assert "".join(thinking) == "Hm."


def test_a_format_becomes_a_grammar(client, engine):
    engine.reply = "{}"
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    shape = {"type": "json_schema", "name": "empty", "schema": schema, "strict": True}
    answer = client.responses.create(input="Hi", text={"format": shape})
    assert answer.output_text == "{}"
    assert engine.submitted[0].options.sampling.grammar is not None


def test_a_tool_without_a_name_is_named(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(input="Hi", tools=[TOOL, {"type": "function"}])
    assert refused.value.param == "tools[1].name"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_the_limit_cuts_off_is_an_incomplete_item(client, engine, stream):
    engine.reply = REPLY.partition("</think>")[2]
    limit = len(engine.reply) - 24
    if stream:
        with client.responses.stream(
            model="org/tiny", input="Paris?", tools=[TOOL], max_output_tokens=limit
        ) as events:
            *_, last = events
        response = last.response
    else:
        response = client.responses.create(input="Paris?", tools=[TOOL], max_output_tokens=limit)
    assert (response.status, response.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    said, called = response.output
    assert said.content[0].text == "Let me look."
    assert (called.status, called.name) == ("incomplete", "weather")
    assert '{"city": "Paris"}'.startswith(called.arguments)
    # The conversation goes on: what was cut off does not make the next turn fail.
    engine.reply = "Well."
    following = client.responses.create(
        input="Go on.", previous_response_id=response.id, tools=[TOOL]
    )
    assert following.output_text == "Well."
