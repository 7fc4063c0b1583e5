# ruff: noqa: RUF001 - the wide bars are the formats' own
"""What is particular to single formats."""

from __future__ import annotations

import json

import pytest

from sapwood.base.errors import ConfigError
from sapwood.text.answer import AnswerShape
from sapwood.text.reasoning.registry import REASONING_FORMATS
from sapwood.text.tools.format import ToolSet
from sapwood.text.tools.json_array import JsonArray
from sapwood.text.tools.mistral import Mistral
from sapwood.text.tools.registry import TOOL_FORMATS, format_of_template

TOOLS = {
    "f": {"properties": {"a": {"type": "integer"}, "s": {"type": "string"}}},
    "g": {},
}


def parsed(name, text, reasoning=None):
    form = REASONING_FORMATS.get(reasoning) if reasoning else None
    tools = ToolSet(parameters=TOOLS)
    shape = AnswerShape(calls=TOOL_FORMATS.get(name)(), tools=tools, reasoning=form)
    return shape.parsed(text)


def calls_of(answer):
    return [(call.name, json.loads(call.arguments)) for call in answer.calls]


def test_kimi_k2_keeps_the_ids_that_the_model_gave():
    answer = parsed(
        "kimi_k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:7<|tool_call_argument_begin|>{}"
        "<|tool_call_end|><|tool_calls_section_end|>",
    )
    assert [call.call_id for call in answer.calls] == ["functions.f:7"]


def test_kimi_k2_without_the_section_tags():
    text = "<|tool_call_begin|>g:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    assert calls_of(parsed("kimi_k2", text)) == [("g", {})]


GENERIC_CALL = '{"name": "f", "arguments": {"a": 1}}'


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>[{GENERIC_CALL}]</tool_call>",
        f"<tool_call>\n[ {GENERIC_CALL} ]",
        f"<tool_call>{GENERIC_CALL}</tool_call>",
        f"<tool_call>```\n{GENERIC_CALL}\n```</tool_call>",
        f" ```json\n[{GENERIC_CALL}]\n```\n",
        f"```\n{GENERIC_CALL}",
        f"\n{GENERIC_CALL}",
        f"[{GENERIC_CALL}]",
        '{"type": "function", "name": "f", "parameters": {"a": 1}}',
    ],
)
def test_generic_calls_as_models_vary_them(text):
    answer = parsed("generic", text)
    assert (answer.content, calls_of(answer)) == ("", [("f", {"a": 1})])


@pytest.mark.parametrize(
    "text",
    [
        f"For example {GENERIC_CALL}",
        f"For example:\n```json\n{GENERIC_CALL}\n```",
        "```python\nf(a=1)\n```",
        "```json\n[1, 2]\n```",
        "```",
        "``",
        "[]",
        "[1] and [2]",
        '{"name": "Ada", "born": 1815}',
        "<tool_call>[]</tool_call>",
        '<tool_call>f(1)</tool_call> [{"name": 1}]',
    ],
)
def test_generic_text_that_is_no_call_stays_as_it_is(text):
    answer = parsed("generic", text)
    assert (answer.content, answer.calls) == (text, [])


CALL_OF_F = '{"name": "f", "parameters": {"a": "not a number"}}'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("generic", CALL_OF_F),
        ("llama3", CALL_OF_F),
        ("llama3", '<|python_tag|>{"name": "f", "parameters": {oops}}; ' + CALL_OF_F),
    ],
)
def test_calls_that_no_grammar_saw_begin_are_content(name, text):
    tools = ToolSet(parameters=TOOLS, only_opened=True)
    answer = AnswerShape(calls=TOOL_FORMATS.get(name)(), tools=tools).parsed(text)
    assert (answer.content, answer.calls) == (text, [])


def test_mistral_takes_ids_of_nine_letters_and_makes_them():
    [call] = parsed("mistral", "[TOOL_CALLS]f[CALL_ID]aB3456789[ARGS]{}").calls
    assert call.call_id == "aB3456789"
    [call] = parsed("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}]').calls
    assert len(call.call_id) == 9
    assert call.call_id.isalnum()
    assert len(JsonArray(Mistral()).new_call_id()) == 9


def test_mistral_of_devstral_leaves_out_the_tag_before_the_arguments():
    assert calls_of(parsed("mistral", '[TOOL_CALLS]f{"a": 1}')) == [("f", {"a": 1})]


def test_llama3_calls_without_its_tag_only_as_a_whole_answer():
    call = '{"name": "f", "parameters": {"a": 1}}'
    assert calls_of(parsed("llama3", call)) == [("f", {"a": 1})]
    assert parsed("llama3", f"For example {call}").content == f"For example {call}"


def test_llama3_answers_that_are_json_stay_as_they_are():
    text = '{"name": {"first": "Ada"}, "born": 1815}'
    assert parsed("llama3", text).content == text


def test_llama3_calls_of_its_own_tools_are_content():
    text = '<|python_tag|>brave_search.call(query="x")'
    assert parsed("llama3", text).content == text


def test_qwen3_coder_without_the_outer_tag():
    text = "Now.\n<function=f>\n<parameter=a>\n5\n</parameter>\n</function>\n</tool_call>"
    answer = parsed("qwen3_coder", text)
    assert (answer.content, calls_of(answer)) == ("Now.", [("f", {"a": 5})])


OPEN, SHUT = '<invoke name="f">', "</invoke>"
A, S = '<parameter name="a">1</parameter>', '<parameter name="s">x</parameter>'


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (f"{OPEN}{A}\n{S}\n", [("f", {"a": 1, "s": "x"})]),
        (f"{OPEN}{A}\n\n{OPEN}{S}{SHUT}", [("f", {"a": 1}), ("f", {"s": "x"})]),
        (f"{OPEN}{A}</parameter>\n{S}{SHUT}", [("f", {"a": 1, "s": "x"})]),
        (f"{OPEN}{A},\n{S}]{SHUT}", [("f", {"a": 1, "s": "x"})]),
        (
            f'{OPEN}<parameter name="a">5\n{SHUT}{OPEN}{S}{SHUT}',
            [("f", {"a": 5}), ("f", {"s": "x"})],
        ),
        (f"oops\n{OPEN}{A}{SHUT}", [("f", {"a": 1})]),
        (f"{OPEN}{S}\nlost</parameter>\n{SHUT}{OPEN}{A}{SHUT}", [("f", {"a": 1})]),
        (f'<invoke name="nothing">{A}{SHUT}{OPEN}{A}{SHUT}', [("f", {"a": 1})]),
    ],
)
def test_calls_in_elements_as_models_break_them(text, calls):
    """A call is read if all of its arguments are there; one whose text is partly lost is not."""
    text = f"<minimax:tool_call>\n{text}\n</minimax:tool_call>"
    assert calls_of(parsed("minimax-m2", text)) == calls


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (
            "f<arg_key>\na\n</arg_key><arg_value>1</arg_value></arg_value></tool_call>",
            [("f", {"a": 1})],
        ),
        (
            "f<arg_key>a</arg_key><arg_value>1</arg_value><tool_call>g</tool_call>",
            [("f", {"a": 1}), ("g", {})],
        ),
        (
            "f<arg_key>a</arg_key><arg_value>1\n</tool_call><tool_call>g</tool_call>",
            [("f", {"a": 1}), ("g", {})],
        ),
        ("f<arg_key>s</arg_key>x</arg_value></tool_call><tool_call>g</tool_call>", [("g", {})]),
    ],
)
def test_glm_calls_as_models_break_them(text, calls):
    assert calls_of(parsed("glm47", f"<tool_call>{text}")) == calls


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("<parameter=s>\n</function>\nx\n</parameter>\n</function>", [{"s": "</function>\nx"}]),
        ("<parameter=s>\n<parameter=a>\n5\n</function>", [{"s": "", "a": 5}]),
        (
            "<parameter=s>\n<parameter=other>\n</parameter>\n</function>",
            [{"s": "<parameter=other>"}],
        ),
        ("<parameter=s>x</parameter></parameter></function>", [{"s": "x"}]),
        ("<parameter=a>1</parameter>\n<function=f>\n</function>", [{"a": 1}, {}]),
        ("lost</parameter>\n<parameter=a>1</parameter></function>", []),
    ],
)
def test_qwen3_coder_values_as_models_break_them(text, calls):
    answer = parsed("qwen3_coder", f"<tool_call>\n<function=f>\n{text}\n</tool_call>")
    assert calls_of(answer) == [("f", arguments) for arguments in calls]


def test_qwen25_several_objects_between_one_pair_of_tags():
    text = '<tool_call>\n{"name": "f"}\n{"name": "g", "arguments": {}}\n</tool_call>'
    assert calls_of(parsed("qwen25", text)) == [("f", {}), ("g", {})]


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "arguments": {"a": 1}}',
        '{"arguments": {"a": 1}, "name": "f"}',
        '{"name": "f", "arguments": "{\\"a\\": 1}"}',
        '{"type": "function", "id": "x", "name": "f", "parameters": {"a": 1}}',
        ' { "name" : "f" ,\n"arguments" : { "a" : 1 } } ',
    ],
)
def test_json_calls_as_models_vary_them(text):
    assert calls_of(parsed("qwen25", f"<tool_call>{text}</tool_call>")) == [("f", {"a": 1})]


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": {"a": 01}}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": 1,}}',
        '{"name": "f", "arguments": {"a": "\\x"}}',
        '{"name": "f", "arguments": "{broken"}',
        '{"name": "f", "arguments": "{\\"a\\": \\"\\\\ud800\\"}\\ud800"}',
        '{"name": "f", "arguments": {"s": "\\ud800"}}',
        '{"name": "f", "arguments": {"s": "\\udc00\\ud800"}}',
        '{"name": "f", "arguments": {"a": 1e999}}',
        '{"name": "f", "name": "g"}',
        '{"name": "f", "thoughts": "hm"}',
        '{"arguments": {}}',
        "{}",
        "{'name': 'f'}",
        '{"name": "f", "arguments": ' + '{"a":' * 120 + "1" + "}" * 120 + "}",
    ],
)
def test_json_that_is_no_call_comes_back_as_it_was(text):
    text = f"<tool_call>{text}</tool_call>"
    answer = parsed("qwen25", text)
    assert (answer.content, answer.calls) == (text, [])


def test_a_line_break_inside_a_json_string_is_mended():
    [call] = parsed("qwen25", '<tool_call>{"name":"f","arguments":{"s":"a\nb\t"}}').calls
    assert json.loads(call.arguments) == {"s": "a\nb\t"}


def test_a_call_after_a_broken_one_is_found():
    text = '<tool_call>{"name": oops}</tool_call>\n<tool_call>{"name": "g"}</tool_call>'
    answer = parsed("qwen25", text)
    assert answer.content == '<tool_call>{"name": oops}</tool_call>'
    assert calls_of(answer) == [("g", {})]


def test_the_end_of_arguments_is_not_told_before_the_call_is_complete():
    shape = AnswerShape(calls=TOOL_FORMATS.get("qwen25")(), tools=ToolSet(parameters=TOOLS))
    parser = shape.parser()
    events = parser.feed('<tool_call>{"name": "f", "arguments": {"a": 1}')
    told = "".join(event.text for event in events if hasattr(event, "text"))
    assert told.endswith('{"a": 1')


def test_arguments_go_out_as_they_come():
    shape = AnswerShape(calls=TOOL_FORMATS.get("qwen3_coder")(), tools=ToolSet(parameters=TOOLS))
    parser = shape.parser()
    parser.feed("<tool_call>\n<function=f>\n<parameter=s>\nab")
    assert [event.text for event in parser.feed("cdef")] == ["cdef"]


@pytest.mark.parametrize(
    ("literal", "value"),
    [
        ("'it\\'s \\x41\\u00e9\\n'", "it's Aé\n"),
        ('"""three\n"quotes\\""""', 'three\n"quotes"'),
        ("r", None),
        ("(1, 2,)", [1, 2]),
        ("[]", []),
        ("{'a': [True, None, -0.5], }", {"a": [True, None, -0.5]}),
        ("1_000", 1000),
        (".5", 0.5),
        ("+7", 7),
        ("true", True),
        ("'\\d'", "\\d"),
        ("'\\N{DIGIT ONE}'", "\\N{DIGIT ONE}"),
        ("{1: 2}", None),
        ("f(1)", None),
        ("float('inf')", None),
        ("1e999", None),
        ("'a' 'b'", None),
        ("lambda: 0", None),
        ("'\\ud800'", None),
    ],
)
def test_python_literals(literal, value):
    answer = parsed("pythonic", f"[g(x={literal})]")
    assert calls_of(answer) == ([] if value is None else [("g", {"x": value})])


def test_pythonic_between_its_tags_and_markdown_links():
    text = "<|python_start|>[f(a=1)]<|python_end|>"
    assert calls_of(parsed("pythonic", text)) == [("f", {"a": 1})]
    text = "See [f](https://f.org) and [f(x)](g), or [f(1)]."
    assert parsed("pythonic", text).content == text


def test_harmony_takes_thinking_preamble_call_and_answer_apart():
    text = (
        "<|channel|>analysis<|message|>They want\nf.<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I call f.<|end|>"
        '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>'
        "<|start|>assistant<|channel|>final<|message|>Done."
    )
    answer = parsed("gpt-oss", text, "gpt-oss")
    assert answer.reasoning == "They want\nf."
    assert answer.content == "I call f.Done."
    assert calls_of(answer) == [("f", {"a": 1})]


def test_harmony_without_a_reasoning_parser_shows_thinking_as_content():
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi"
    answer = parsed("gpt-oss", text)
    assert (answer.reasoning, answer.content) == ("", "Hm.Hi")


def test_harmony_calls_of_built_in_tools_are_content():
    text = '<|channel|>commentary to=browser.search <|message|>{"query": "x"}<|call|>'
    assert parsed("gpt-oss", text, "gpt-oss").content == text


def test_a_forced_list_of_calls_after_thinking():
    shape = AnswerShape(
        reasoning=REASONING_FORMATS.get("gpt-oss"),
        calls=JsonArray(),
        tools=ToolSet(parameters=TOOLS),
    )
    answer = shape.parsed(
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"
        '[{"name": "f", "parameters": {"a": 1}}]'
    )
    assert (answer.reasoning, answer.content, calls_of(answer)) == ("Hm.", "", [("f", {"a": 1})])


def test_calls_that_a_grammar_can_follow_are_spelled_as_the_parser_reads_them():
    for name in TOOL_FORMATS.names():
        form = TOOL_FORMATS.get(name)()
        spelled = form.structure("f")
        if spelled is None:
            continue
        assert spelled.begin.startswith(spelled.trigger)
        text = spelled.begin + '{"a": 1}' + spelled.end
        assert calls_of(parsed(name, text)) == [("f", {"a": 1})]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("{{ '<tool_call>\\n{\"name\": ' }}", "qwen25"),
        ("<tool_call>\n<function=example_function_name>", "qwen3_coder"),
        ("{{ '<｜tool▁calls▁begin｜>' + '\\n```json\\n' }}", "deepseekv3"),
        ("{{ '<｜tool▁calls▁begin｜>' }}", "deepseekv31"),
        ("<｜DSML｜invoke", "deepseekv32"),
        ("<tool_call>{name}\n<arg_key>{k}</arg_key>\n<arg_value>", "glm45"),
        ("<tool_call>{name}<arg_key>{k}</arg_key><arg_value>", "glm47"),
        ("<|tool_calls_section_begin|>", "kimi_k2"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ("<|start|>assistant<|channel|>final", "gpt-oss"),
        ("<minimax:tool_call>", "minimax-m2"),
        ("<steptml:invoke", "step3"),
        ("<|action_start|><|plugin|>", "interns1"),
        ("{{- '<|python_tag|>' }}", "llama3"),
        ("[func_name1(params_name1=params_value1)]", "pythonic"),
        ("{{ messages[0].content }}", None),
    ],
)
def test_a_template_points_at_its_format(source, name):
    assert format_of_template(source) == name


def test_a_format_that_is_not_known_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"unknown tool-call parser 'nope'.*qwen3_coder"):
        TOOL_FORMATS.get("nope")
