"""Thinking through the chat route."""

from __future__ import annotations

import pytest

from tests.frontends.chats import changes, read_stream, read_whole, tools_of
from tests.text.reasoning.test_every_parser import NAMES, PAIRS, written

URL = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "2+2?"}]
THOUGHT = "<think>\nTwo and two.\n</think>\n\nFour."


@pytest.fixture
def chat(api_with):
    return api_with(**changes("qwen25", "qwen3"))


def ask(**extra):
    return {"messages": MESSAGES, **extra}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "minimax-append-think"])
def test_the_official_clients_stream_gives_the_same_as_a_whole_answer(api_with, engine, name):
    app = api_with(**changes(None, name)).app
    for thought, content in PAIRS:
        engine.reply = written(name, thought, content, opened=False)
        whole = read_whole(app, **ask())
        assert (whole["reasoning"].strip(), whole["content"]) == (thought.strip(), content)
        assert read_stream(app, **ask()) == whole


def test_thinking_is_told_apart_and_counted(chat, engine):
    engine.reply = THOUGHT
    answer = chat.post(URL, ask()).json()
    message = {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."}
    assert answer["choices"][0]["message"] == message
    # A token per byte, the tags' included.
    assert answer["usage"]["reasoning_tokens"] == len("<think>\nTwo and two.\n</think>")
    details = answer["usage"]["completion_tokens_details"]
    assert details == {"reasoning_tokens": answer["usage"]["reasoning_tokens"]}


def test_thinking_can_be_left_in_the_content(chat, engine):
    engine.reply = THOUGHT
    message = chat.post(URL, ask(separate_reasoning=False)).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": THOUGHT}


def test_a_stream_may_tell_the_thinking_at_once(chat, engine, events):
    engine.reply = THOUGHT
    for streams, is_one in ((True, False), (False, True)):
        got = events(chat.post(URL, ask(stream=True, stream_reasoning=streams)).text)
        deltas = [event["choices"][0]["delta"] for event in got]
        thoughts = [one["reasoning_content"] for one in deltas if "reasoning_content" in one]
        assert "".join(thoughts) == "Two and two."
        assert (len(thoughts) == 1) is is_one
        assert "".join(one.get("content") or "" for one in deltas) == "Four."


def test_thinking_that_is_cut_off_is_told_even_if_held(chat, engine, events):
    engine.reply = THOUGHT
    got = events(chat.post(URL, ask(stream=True, stream_reasoning=False, max_tokens=11)).text)
    assert got[1]["choices"][0]["delta"] == {"reasoning_content": "Two"}


def test_thinking_turned_off_in_the_prompt(chat, engine, prompt_of):
    engine.reply = "I would not <think> so."
    body = ask(chat_template_kwargs={"enable_thinking": False})
    message = chat.post(URL, body).json()["choices"][0]["message"]
    assert prompt_of().endswith("<think>\n\n</think>\n\n")
    assert message["content"] == engine.reply
    assert message["reasoning_content"] is None


@pytest.mark.parametrize(("effort", "is_off"), [("none", True), ("high", False)])
def test_effort_turns_thinking_on_and_off(chat, prompt_of, effort, is_off):
    assert chat.post(URL, ask(reasoning_effort=effort)).status_code == 200
    assert prompt_of().endswith("</think>\n\n") is is_off


def test_effort_goes_to_a_template_that_knows_it(api_with, prompt_of):
    from sapwood.text.template import ChatTemplate

    template = ChatTemplate("{{ messages[0].content }} effort={{ reasoning_effort }}")
    api = api_with(template=template)
    assert api.post(URL, ask(reasoning_effort="low")).status_code == 200
    assert prompt_of().endswith("effort=low")


def test_a_prefix_with_an_open_tag_goes_on_thinking(chat, engine):
    prefix = {"role": "assistant", "content": "<think>\nTwo"}
    body = {"messages": [*MESSAGES, prefix], "continue_final_message": True}
    engine.reply = " and two.\n</think>\n\nFour."
    message = chat.post(URL, body).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("and two.", "Four.")


def test_a_prefix_with_a_closed_tag_goes_on_answering(api_with, engine):
    prefix = {"role": "assistant", "content": "<think>\nTwo\n</think>\n\nThe"}
    body = {"messages": [*MESSAGES, prefix], "continue_final_message": True}
    engine.reply = " answer is four."
    for name in ("qwen3", "deepseek-r1"):
        message = api_with(**changes(None, name)).post(URL, body).json()["choices"][0]["message"]
        assert message["content"] == " answer is four."
        assert message["reasoning_content"] is None


def test_a_call_after_thinking(chat, engine):
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    engine.reply = f"<think>\nI call f: {call}\n</think>\n\n{call}"
    answer = read_stream(chat.app, **ask(tools=tools_of({"f": {}})))
    assert answer["reasoning"] == f"I call f: {call}"
    assert (answer["content"], answer["calls"]) == ("", [("f", {})])


def test_a_grammar_begins_after_the_thinking(chat, engine):
    engine.reply = '<think>\nHm.\n</think>{"a": 1}'
    body = ask(response_format={"type": "json_object"})
    message = chat.post(URL, body).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", '{"a": 1}')
    thinking = engine.submitted[-1].options.sampling.grammar.thinking
    assert (thinking.begin, thinking.end, thinking.is_open) == ("<think>", "</think>", False)


def test_a_grammar_holds_from_the_start_when_thinking_is_off(chat, engine):
    body = ask(regex="a+", chat_template_kwargs={"enable_thinking": False})
    assert chat.post(URL, body).status_code == 200
    assert engine.submitted[-1].options.sampling.grammar.thinking is None


def test_output_of_a_grammar_is_content_even_if_the_parser_expects_thinking(api_with, engine):
    engine.reply = '{"a": 1}'
    api = api_with(**changes(None, "deepseek-r1"))
    message = api.post(URL, ask(json_schema={})).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (None, '{"a": 1}')


def test_a_required_call_after_thinking(chat, engine):
    engine.reply = '<think>\nHm.\n</think>\n\n[{"name": "f", "parameters": {}}]'
    answer = read_whole(chat.app, **ask(tools=tools_of({"f": {}}), tool_choice="required"))
    assert (answer["reasoning"], answer["calls"]) == ("Hm.", [("f", {})])


def test_a_thinking_budget_goes_to_the_engine(chat, engine, tokenizer):
    assert chat.post(URL, ask(thinking_budget=7)).status_code == 200
    budget = engine.submitted[-1].options.sampling.thinking_budget
    assert budget.max_tokens == 7
    assert tokenizer.decode(list(budget.begin)) == "<think>"
    assert tokenizer.decode(list(budget.end)) == "</think>"
    assert tokenizer.decode(list(budget.forced)) == "\n</think>"
    assert budget.is_open is False


def test_a_budget_counts_no_answer_that_a_grammar_holds_from_its_start(api_with, engine):
    """The parser expects thinking without a tag; the grammar allows it only after one."""
    api = api_with(**changes(None, "deepseek-r1"))
    for extra, is_open in (({}, True), ({"regex": "a+"}, False)):
        assert api.post(URL, ask(thinking_budget=0, **extra)).status_code == 200
        assert engine.submitted[-1].options.sampling.thinking_budget.is_open is is_open
    assert engine.submitted[-1].options.sampling.grammar.thinking.is_open is False


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"thinking_budget": 5}, "thinking_budget"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"documents": [{"text": "x"}]}, "documents"),
    ],
)
def test_what_a_model_without_thinking_refuses(api, engine, extra, param):
    refused = api.post(URL, ask(**extra))
    assert (refused.status_code, refused.json()["param"]) == (400, param)
    assert engine.submitted == []


def test_an_effort_changes_nothing_for_a_model_that_does_not_think(api, engine):
    assert api.post(URL, ask(reasoning_effort="high")).status_code == 200
    assert api.post(URL, ask()).status_code == 200
    assert engine.submitted[0].prompt_ids == engine.submitted[1].prompt_ids


def test_documents_go_to_a_template_that_takes_them(api_with, prompt_of):
    from sapwood.text.template import ChatTemplate

    template = ChatTemplate("{% for d in documents %}[{{ d.text }}]{% endfor %}")
    api = api_with(template=template)
    assert api.post(URL, ask(documents=[{"text": "one"}, {"text": "two"}])).status_code == 200
    assert prompt_of() == "[one][two]"
