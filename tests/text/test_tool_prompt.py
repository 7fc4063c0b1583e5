"""Tools, calls and results as text, through templates that know nothing of them."""

from __future__ import annotations

import json

import pytest

from sapwood.base.errors import InvalidRequest
from sapwood.text.answer import AnswerShape
from sapwood.text.template import ChatTemplate
from sapwood.text.tool_prompt import spelled_out, tools_text
from sapwood.text.tools.format import ToolSet
from sapwood.text.tools.generic import Generic
from tests.text import chat_templates as families

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'The weather of "Zürich" & others',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}},
]


def call(name, arguments, call_id):
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Zürich, and the time?"},
    {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [
            call("get_weather", '{"city": "Zürich"}', "one"),
            call("now", {}, "two"),
        ],
    },
    {"role": "tool", "tool_call_id": "two", "content": "12:00"},
    {"role": "tool", "tool_call_id": "one", "content": [{"type": "text", "text": "sunny"}]},
    {"role": "assistant", "content": "Sunny, and noon."},
    {"role": "user", "content": "And in Rome?"},
    {"role": "assistant", "tool_calls": [call("get_weather", '{"city": "Rome"}', "three")]},
    {"role": "tool", "tool_call_id": "three", "content": "rain"},
    {"role": "user", "content": "Well?"},
]

CALLS = (
    '<tool_call>[{"name": "get_weather", "arguments": {"city": "Zürich"}}, '
    '{"name": "now", "arguments": {}}]</tool_call>'
)


@pytest.mark.parametrize("family", families.WITHOUT_PLACE)
def test_any_template_renders_tools_calls_and_results(family):
    template = ChatTemplate(families.WITHOUT_PLACE[family], special_tokens=SPECIAL)
    in_system = template.places.system
    messages = CONVERSATION if in_system else CONVERSATION[1:]
    prompt = template.render(spelled_out(messages, TOOLS, in_system=in_system))
    expected = [
        '{"name": "get_weather", "description": "The weather of \\"Zürich\\" & others", ',
        f"Let me see.\n{CALLS}",
        "The function now returned:\n12:00\n\nThe function get_weather returned:\nsunny",
        "Sunny, and noon.",
        '<tool_call>[{"name": "get_weather", "arguments": {"city": "Rome"}}]</tool_call>',
        "The function get_weather returned:\nrain\n\nWell?",
    ]
    places = [prompt.index(part) for part in expected]
    assert places == sorted(places)


@pytest.mark.parametrize("family", families.WITHOUT_PLACE)
@pytest.mark.parametrize("rest", [[], [{"role": "assistant", "content": "Which?"}]])
def test_any_template_renders_the_first_turn(family, rest):
    template = ChatTemplate(families.WITHOUT_PLACE[family], special_tokens=SPECIAL)
    messages = [{"role": "user", "content": "Weather?"}, *rest]
    prompt = template.render(spelled_out(messages, TOOLS, in_system=template.places.system))
    assert prompt.index(tools_text(TOOLS)) < prompt.index("Weather?")


def test_the_text_comes_after_the_requests_own_system_text():
    for role in ("system", "developer"):
        given = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        first, second = spelled_out(given, TOOLS, in_system=True)
        assert first == {"role": role, "content": f"Be brief.\n\n{tools_text(TOOLS)}"}
        assert second == given[1]


def test_system_messages_further_on_stay_where_they_are():
    given = [
        {"role": "user", "content": "Hi"},
        {"role": "system", "content": "Now in French."},
        {"role": "user", "content": "Weather?"},
    ]
    [added, *others] = spelled_out(given, TOOLS, in_system=True)
    assert added == {"role": "system", "content": tools_text(TOOLS)}
    assert others == given


def test_where_no_system_message_is_shown_the_text_is_the_users():
    given = [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Weather?"}]
    told = {"role": "user", "content": f"{tools_text(TOOLS)}\n\nWeather?"}
    assert spelled_out(given, TOOLS, in_system=False) == [given[0], told]
    alone = [{"role": "assistant", "content": "Hi"}]
    assert spelled_out(alone, TOOLS, in_system=False)[0] == {
        "role": "user",
        "content": tools_text(TOOLS),
    }


def test_without_tools_only_calls_and_results_are_spelled():
    plain = [{"role": "user", "content": "Hi", "name": "Ada"}, {"role": "user", "content": "Yo"}]
    assert spelled_out(plain, [], in_system=True) == plain
    spelled = spelled_out(CONVERSATION, [], in_system=True)
    assert spelled[0] == CONVERSATION[0]
    assert [message["role"] for message in spelled] == [
        "system",
        *["user", "assistant"] * 3,
        "user",
    ]
    assert all("tool_calls" not in message for message in spelled)


def test_contents_of_parts_stay_parts():
    image = {"type": "image_url", "image_url": {"url": "x"}}
    given = [
        {"role": "tool", "content": "sunny", "name": "get_weather"},
        {"role": "user", "content": [{"type": "text", "text": "See"}, image]},
    ]
    [told] = spelled_out(given, TOOLS, in_system=False)
    assert "".join(part.get("text", "") for part in told["content"]) == (
        f"{tools_text(TOOLS)}\n\nThe function get_weather returned:\nsunny\n\nSee"
    )
    assert told["content"][-1] == image
    with pytest.raises(InvalidRequest, match="image_url"):
        spelled_out([{"role": "tool", "content": [image]}], [], in_system=True)


def test_the_order_of_results_may_be_any_and_ids_unknown():
    given = [{"role": "tool", "tool_call_id": "lost", "content": None}]
    [told] = spelled_out(given, [], in_system=True)
    assert told == {"role": "user", "content": "The function returned:\n"}
    [told] = spelled_out([{"role": "tool", "content": {"a": [1]}}], [], in_system=True)
    assert '{"a": [1]}' in told["content"]


def test_arguments_that_are_no_json_are_shown_as_they_were():
    broken = [{"role": "assistant", "tool_calls": [call("f", '{"a": ', "1")]}]
    [said] = spelled_out(broken, [], in_system=True)
    assert said["content"] == '<tool_call>[{"name": "f", "arguments": {"a":}]</tool_call>'
    for empty in ("", None, {}):
        [said] = spelled_out(
            [{"role": "assistant", "content": "", "tool_calls": [call("f", empty, "1")]}],
            [],
            in_system=True,
        )
        assert said["content"] == '<tool_call>[{"name": "f", "arguments": {}}]</tool_call>'


def test_what_is_spelled_is_what_the_parser_reads():
    spelled = spelled_out(CONVERSATION, [], in_system=True)
    tools = ToolSet(parameters={"get_weather": {}, "now": {}})
    answer = AnswerShape(calls=Generic(), tools=tools).parsed(spelled[2]["content"])
    assert answer.content == "Let me see."
    assert [(one.name, json.loads(one.arguments)) for one in answer.calls] == [
        ("get_weather", {"city": "Zürich"}),
        ("now", {}),
    ]


def test_the_format_that_the_text_shows_is_what_the_parser_reads():
    text = tools_text(TOOLS)
    [shown] = [line for line in text.splitlines() if line.startswith("<tool_call>")]
    tools = ToolSet(keeps_unknown=True)
    shape = AnswerShape(calls=Generic(), tools=tools)
    [read] = shape.parsed(shown.replace("function name", "f")).calls
    assert json.loads(read.arguments) == {"parameter name": "value"}


def test_one_call_at_a_time_is_said():
    assert "one function at a time" in tools_text(TOOLS, parallel=False)
    assert "one function at a time" not in tools_text(TOOLS)


def deep(levels):
    value = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("message", "where"),
    [
        ({"role": "assistant", "tool_calls": [7]}, r"messages\[0\]\.tool_calls\[0\]"),
        ({"role": "assistant", "tool_calls": [{}]}, r"messages\[0\]\.tool_calls\[0\]"),
        ({"role": "assistant", "tool_calls": [{"function": "f"}]}, "tool_calls"),
        ({"role": "assistant", "tool_calls": "f()"}, "must be a list"),
        ({"role": "assistant", "tool_calls": [call("f", {1: {2}}, "1")]}, "TypeError"),
        ({"role": "assistant", "tool_calls": [call("f", deep(100_000), "1")]}, "RecursionError"),
        ({"role": "tool", "content": {1, 2}}, r"messages\[0\]\.content"),
        ({"content": "no role"}, "no role"),
    ],
)
def test_what_cannot_be_spelled_is_refused(message, where):
    with pytest.raises(InvalidRequest, match=where):
        spelled_out([message], TOOLS, in_system=True)


@pytest.mark.timeout(60)
def test_many_results_are_joined_at_once():
    many = 200_000
    result = {"role": "tool", "content": "x" * 200}
    _, told = spelled_out([result] * many, TOOLS, in_system=True)
    assert many * 200 < len(told["content"]) < many * 300
