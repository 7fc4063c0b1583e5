import pytest

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.frontends.responses.items import input_items, to_messages


def messages(*items, instructions=""):
    return to_messages(input_items(list(items)), instructions)


def test_a_text_is_a_message_of_the_user():
    assert to_messages(input_items("Hi"), "") == [{"role": "user", "content": "Hi"}]


def test_what_the_assistant_did_in_a_row_is_one_message():
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    thought = {"type": "reasoning", "summary": [], "id": "rs_1"}
    thought["content"] = [{"type": "reasoning_text", "text": "Hm."}]
    told = messages(
        {"role": "user", "content": "Hi"},
        thought,
        {"role": "assistant", "content": [{"type": "output_text", "text": "A", "annotations": []}]},
        call,
        {**call, "call_id": "d"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
        {
            "type": "function_call_output",
            "call_id": "d",
            "output": [{"type": "input_text", "text": "2"}],
        },
        {"role": "assistant", "content": "B"},
    )
    assert [one["role"] for one in told] == ["user", "assistant", "tool", "tool", "assistant"]
    said = told[1]
    assert (said["content"], said["reasoning_content"]) == ("A", "Hm.")
    assert [one["id"] for one in said["tool_calls"]] == ["c", "d"]
    assert said["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert [(one["tool_call_id"], one["content"]) for one in told[2:4]] == [("c", "1"), ("d", "2")]


def test_a_call_alone_has_no_content_and_a_thought_alone_has():
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    assert "content" not in messages(call)[0]
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]}
    assert messages(thought) == [{"role": "assistant", "content": "", "reasoning_content": "Hm."}]


def test_instructions_and_a_first_system_message_are_one():
    developer = {"role": "developer", "content": "B"}
    user = {"role": "user", "content": "C"}
    assert messages(developer, user, instructions="A") == [
        {"role": "system", "content": "A\n\nB"},
        {"role": "user", "content": "C"},
    ]
    assert [one["role"] for one in messages(user, developer)] == ["user", "system"]


def test_items_get_ids_of_their_own():
    given = {"role": "user", "content": "x", "id": "msg_mine"}
    first, second = input_items([given, given])
    assert first["id"].startswith("msg_")
    assert len({first["id"], second["id"], "msg_mine"}) == 3


@pytest.mark.parametrize(
    ("item", "where"),
    [
        ("x", "input[0]"),
        ({"role": "user"}, "input[0].content"),
        ({"role": "user", "content": ["x"]}, "input[0].content[0]"),
        ({"role": "user", "content": [{"type": "video"}]}, "input[0].content[0].type"),
        ({"type": "function_call", "name": "f", "arguments": "{}"}, "input[0].call_id"),
        ({"type": "function_call_output", "call_id": "c"}, "input[0].output"),
        ({"type": ["message"]}, "input[0]"),
        ({"role": "user", "content": "x", "colour": 1}, "input[0].colour"),
    ],
)
def test_a_bad_item_is_named(item, where):
    with pytest.raises(InvalidRequest) as refused:
        input_items([item])
    assert refused.value.param == where


def test_items_of_tools_that_openai_runs_are_not_supported():
    with pytest.raises(UnsupportedFeature, match="web_search_call"):
        input_items([{"type": "web_search_call", "id": "x"}])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("role", ["assistant", "system"])
def test_many_items_that_become_one_message_are_joined_at_once(role):
    item = {"type": "message", "role": role, "content": [{"text": "x" * 200}]}
    [message] = to_messages([item] * 200_000, "Be brief." if role == "system" else "")
    assert len(message["content"]) >= 40_000_000
