# ruff: noqa: RUF001 - the wide marks are the formats' own
"""Calls as elements, and as a list in JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tests.text.tools.peer_cases.case import (
    ARR,
    CODER,
    DATED,
    DOCS,
    INT,
    MINIMAX,
    NUM,
    OBJ,
    PLACES,
    STR,
    TODOS,
    Call,
    Case,
    G,
    P,
    Q,
    _object,
)


def qwen3_coder_cases() -> list[Case]:
    def case(
        name: str, text: str, calls: Sequence[Call], content: str | None = "", **more: Any
    ) -> Case:
        return Case(name, "qwen3_coder", text, calls, content, CODER, **more)

    def call(name: str, body: str) -> str:
        return f"<tool_call>\n<function={name}>\n{body}\n</function>\n</tool_call>"

    def bare(name: str, body: str) -> str:
        return f"<function={name}>\n{body}\n</function>"

    three = (
        "<parameter=location>Oslo</parameter>\n<parameter=unit>celsius</parameter>\n"
        "<parameter=days>3</parameter>"
    )
    full = ("weather", {"location": "Oslo", "unit": "celsius", "days": 3})
    oslo, place = ("weather", {"location": "Oslo"}), "<parameter=location>Oslo</parameter>"
    select = "<parameter=query>SELECT 1</parameter>\n<parameter=dry_run>True</parameter>"
    query = ("sql", {"query": "SELECT 1", "dry_run": True})
    todos = [{"content": "Buy", "status": "pending"}, {"content": "Sell", "status": "done"}]
    drift = "qwen3_coder unit:MalformedParameterEnd"
    own = "qwen3_coder cases"

    def drifted(city: str) -> str:
        return call("weather", f"<parameter=location>\n{city}\n<parameter=days>\n3\n</parameter>")

    days = ("weather", {"location": "Oslo", "days": 3})

    def located(location: str) -> list[Call]:
        return [("weather", {"location": location, "days": 3})]

    quoted = "SELECT * FROM t WHERE name = 'A \"B\"'"
    return [
        case(f"{P}:{Q}.plain_text_only", "Nothing is called here.", [], "Nothing is called here."),
        case(f"{P}:{Q}.single_tool_call", call("weather", three), [full]),
        case(
            f"{P}:{Q}.with_text_prefix", "I look.\n\n" + call("weather", place), [oslo], "I look."
        ),
        case(
            f"{P}:{Q}.multiple_tool_calls",
            call("weather", place) + "\n" + call("sql", select),
            [oslo, query],
        ),
        case(f"{P}:{Q}.streaming_single_tool_call", call("weather", three), [full]),
        case(
            f"{P}:{Q}.streaming_with_text",
            "I look.\n\n" + call("weather", place),
            [oslo],
            "I look.",
        ),
        case(
            f"{P}:{Q}.integer_parameter",
            call("weather", "<parameter=days>5</parameter>"),
            [("weather", {"days": 5})],
        ),
        case(f"{P}:{Q}.boolean_parameter", call("sql", select), [query]),
        case(
            f"{P}:{Q}.complex_array_parameter",
            call("todo", f"<parameter=todos>\n{json.dumps(todos, indent=1)}\n</parameter>"),
            [("todo", {"todos": todos})],
        ),
        case(
            f"{P}:{Q}.empty_parameter_value",
            call("weather", "<parameter=location></parameter>"),
            [("weather", {"location": ""})],
        ),
        case(
            f"{P}:{Q}.special_characters",
            call("sql", f"<parameter=query>{quoted}</parameter>"),
            [("sql", {"query": quoted})],
        ),
        case(
            f"{P}:{Q}.incomplete_tool_call",
            "<tool_call>\n<function=weather>\n<parameter=location>Oslo",
            [],
            cut=("weather", '{"location": "Oslo'),
        ),
        case(f"{own}.plain_text", "Nothing is called here.", [], "Nothing is called here."),
        case(f"{own}.single_tool_call", bare("weather", three), [full]),
        case(f"{own}.with_text", "I look.\n\n" + bare("weather", three), [full], "I look."),
        case(
            f"{own}.double_tool_call",
            "I look.\n\n" + bare("weather", place) + "\n" + bare("sql", select) + "\n",
            [oslo, query],
            "I look.",
        ),
        case(
            f"{own}.random_fragmentation", "I look.\n\n" + bare("weather", place), [oslo], "I look."
        ),
        case(
            f"{own}.implicit_parameter_close",
            bare("weather", "<parameter=location>Oslo\n<parameter=unit>celsius\n<parameter=days>3"),
            [full],
        ),
        case(
            f"{own}.complex_schema",
            bare(
                "todo",
                '<parameter=todos>\n[\n {"content": "Buy", "status": \'pending\'},\n'
                ' {"content": "Sell", "status": "done"}\n]\n</parameter>',
            ),
            [("todo", {"todos": todos})],
        ),
        case(
            "qwen3_coder (2025):full_parse",
            "<tool_call><function=weather>" + three.replace("\n", "") + "</tool_call>",
            [full],
        ),
        case(f"{drift}.word", drifted("Oslo\n</parameter_function>"), [days]),
        case(f"{drift}.number", drifted("Oslo\n</parameter1>"), [days]),
        case(f"{drift}.no_bracket", drifted("Oslo\n</parameter"), [days]),
        case(f"{drift}.well_formed", drifted("Oslo\n</parameter>"), [days]),
        case(f"{drift}.angle_brackets", drifted("a <b>c</b>\n</parameter>"), located("a <b>c</b>")),
        case(
            f"{drift}.closed_value_ending_like_a_marker",
            drifted("<config>\n  <p>1</p>\n</parameters>\n</parameter>"),
            located("<config>\n  <p>1</p>\n</parameters>"),
        ),
        case(
            f"{drift}.closed_value_ending_like_a_word",
            drifted("x </parameterList>\n</parameter>"),
            located("x </parameterList>"),
        ),
        case(
            f"{drift}.long_whitespace",
            drifted("a" + " " * 200 + "b"),
            located("a" + " " * 200 + "b"),
        ),
    ]


def glm_cases() -> list[Case]:
    def pairs(*arguments: tuple[str, str], gap: str) -> str:
        return "".join(
            f"<arg_key>{key}</arg_key>{gap}<arg_value>{value}</arg_value>{gap}"
            for key, value in arguments
        )

    def call(name: str, *arguments: tuple[str, str], gap: str) -> str:
        return f"<tool_call>{name}{gap}{pairs(*arguments, gap=gap)}</tool_call>"

    one = ("city", "Oslo"), ("date", "2026-01-27")
    two = ("city", "Bergen"), ("date", "2026-01-28")
    oslo, bergen = ("get_weather", dict(one)), ("get_weather", dict(two))
    todos = [{"id": "1", "task": "Look at C:\\x.txt, print \\n", "status": "pending"}]
    plain = json.dumps(todos)
    escaped = json.dumps(plain)[1:-1]
    cases = []
    for parser, gap in (("glm45", "\n"), ("glm47", "")):
        for name, text, calls in (
            ("single_tool_call", call("get_weather", *one, gap=gap), [oslo]),
            (
                "multiple_tool_calls",
                call("get_weather", *one, gap=gap) + call("get_weather", *two, gap=gap),
                [oslo, bergen],
            ),
            ("streaming_tool_call", call("get_weather", *one, gap=gap), [oslo]),
            (
                "streaming_multiple_tool_calls",
                call("get_weather", *one, gap=gap) + call("get_weather", *two, gap=gap),
                [oslo, bergen],
            ),
            ("tool_call_id", call("get_weather", *two, gap=gap), [bergen]),
            ("partial_tool_call", call("get_weather", *one, gap=gap), [oslo]),
        ):
            cases.append(Case(f"{P}:{parser}.{name}", parser, text, calls, "", DATED))
        unknown = call("nothing", *one, gap=gap)
        cases.append(Case(f"{P}:{parser}.invalid_tool_call", parser, unknown, [], None, DATED))
        for name, value in (("plain", plain), ("escaped", escaped)):
            for spelled_gap in (gap, "\\n" if name == "escaped" and gap else gap):
                text = call("todo_write", ("todos", value), gap=spelled_gap)
                label = f"{P}:{parser}.array_argument {name} {spelled_gap!r}"
                if any(case.name == label for case in cases):
                    continue
                cases.append(
                    Case(label, parser, text, [("todo_write", {"todos": todos})], "", TODOS)
                )
    cases += [
        Case(f"{P}:glm45.empty_function_name", "glm45", "<tool_call>\n", [], None, DATED),
        Case(
            "glm: name of the parser", "glm", call("get_weather", *one, gap="\n"), [oslo], "", DATED
        ),
    ]

    def g47(
        name: str,
        function: str,
        schema: dict[str, Any],
        arguments: Sequence[tuple[str, str]],
        values: dict[str, Any],
        before: str = "",
        after: str = "",
        content: str = "",
    ) -> Case:
        text = before + call(function, *arguments, gap="") + after
        return Case(f"{G}:{name}", "glm47", text, [(function, values)], content, {function: schema})

    deep = {"a": {"b": {"c": {"d": {"value": "deep"}}}}}
    task = _object(title=STR, place=STR)
    cases += [
        g47("no_arg_function_non_streaming", "list", _object(), [], {}),
        g47(
            "mtp_func_and_string_split",
            "task",
            task,
            [("title", "Go to Oslo"), ("place", "San Francisco")],
            {"title": "Go to Oslo", "place": "San Francisco"},
            before="I do it.",
            content="I do it.",
        ),
        g47(
            "mtp_number_and_complex_json",
            "todos",
            _object(priority=NUM, count=INT, items=ARR),
            [("priority", "5.5"), ("count", "10"), ("items", '[{"text": "A 1"}, {"text": "B 2"}]')],
            {"priority": 5.5, "count": 10, "items": [{"text": "A 1"}, {"text": "B 2"}]},
        ),
        g47(
            "normal_text_before_tool_call",
            "list",
            _object(path=STR),
            [],
            {},
            before="结构：",
            content="结构：",
        ),
        g47(
            "boundary_empty_param_value",
            "note",
            _object(title=STR, text=STR),
            [("title", "T"), ("text", "")],
            {"title": "T", "text": ""},
        ),
        g47(
            "boundary_extreme_split",
            "search",
            _object(query=STR),
            [("query", "New Y")],
            {"query": "New Y"},
        ),
        g47(
            "boundary_special_chars",
            "run",
            _object(command=STR),
            [("command", "echo 'A & B'")],
            {"command": "echo 'A & B'"},
        ),
        g47(
            "boundary_deeply_nested",
            "data",
            _object(data=OBJ),
            [("data", json.dumps(deep))],
            {"data": deep},
        ),
        g47(
            "boundary_empty_structures",
            "make",
            _object(obj=OBJ, arr=ARR),
            [("obj", "{}"), ("arr", "[]")],
            {"obj": {}, "arr": []},
        ),
        g47(
            "boundary_multi_tags",
            "many",
            _object(a=STR, b=STR),
            [("a", "1"), ("b", "2")],
            {"a": "1", "b": "2"},
        ),
        g47(
            "boundary_normal_text_mixed",
            "act",
            _object(),
            [],
            {},
            before="First this.",
            after="Then that.",
            content="First this.Then that.",
        ),
        g47(
            "boundary_number_edge_values",
            "sum",
            _object(zero=NUM, minus=NUM, large=NUM),
            [("zero", "0"), ("minus", "-42.5"), ("large", "1e10")],
            {"zero": 0, "minus": -42.5, "large": 1e10},
        ),
        g47(
            "boundary_string_with_numeric_content",
            "store",
            _object(id=STR, code=STR),
            [("id", "12345"), ("code", "67.89")],
            {"id": "12345", "code": "67.89"},
        ),
        Case(
            f"{G}:mtp_noarg_and_multiple_calls",
            "glm47",
            call("list", gap="") + call("get_weather", *one, gap=""),
            [("list", {}), oslo],
            "",
            {"list": _object(), **DATED},
        ),
        Case(f"{G}:error_undefined_tool", "glm47", call("nothing", *one, gap=""), [], None, DATED),
        Case(
            f"{G}:error_incomplete_buffer",
            "glm47",
            "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Oslo",
            [],
            "",
            DATED,
            cut=("get_weather", '{"city": "Oslo'),
        ),
    ]
    return cases


def json_array_cases() -> list[Case]:
    def case(
        name: str, text: str, calls: Sequence[Call], content: str | None = "", **more: Any
    ) -> Case:
        return Case(f"{P}:JsonArray.{name}", "json_array", text, calls, content, PLACES, **more)

    def call(location: str) -> str:
        return f'{{"name": "get_weather", "parameters": {{"location": "{location}"}}}}'

    def at(location: str) -> Call:
        return ("get_weather", {"location": location})

    oslo, search = call("Oslo"), '{"name": "search", "parameters": {"query": "q"}}'
    open_call = '{"name": "get_weather", "parameters": {"location": "Oslo"'
    docs = '{"name": "search_docs", "parameters": {"title": ["7.8"], "filename": "d"}}'
    return [
        case("malformed_json", f"[{open_call}", [], cut=("get_weather", '{"location": "Oslo"')),
        case("malformed_list", "[{}}}]", [], "[{}}}]"),
        case("empty_input", "", [], ""),
        case("increment_whitespace", f"  [{oslo}]  ", [at("Oslo")]),
        case(
            "nested_objects",
            f'[{open_call}, "nested": {{"key": "value"}}}}}}]',
            [("get_weather", {"location": "Oslo", "nested": {"key": "value"}})],
        ),
        case("commas", f"[{oslo},{call('Bergen')}]", [at("Oslo"), at("Bergen")]),
        case("braces_in_strings", f"[{call('has } inside')}]", [at("has } inside")]),
        case("separator_in_same_chunk", f"[{oslo},{oslo}]", [at("Oslo"), at("Oslo")]),
        case(
            "separator_in_separate_chunk", f"[{oslo},{call('Bergen')}", [at("Oslo"), at("Bergen")]
        ),
        case(
            "incomplete_json_across_chunks",
            f'[{oslo},{{"name": "get_weather"',
            [at("Oslo")],
            cut=("get_weather", ""),
        ),
        case(
            "malformed_json_recovery",
            '[{"name": "get_weather", "parameters": {"location": "unclosed',
            [],
            cut=("get_weather", '{"location": "unclosed'),
        ),
        case(
            "nested_objects_with_commas",
            f'[{open_call}, "unit": "celsius"}}}}]',
            [("get_weather", {"location": "Oslo", "unit": "celsius"})],
        ),
        case("empty_objects", '[{"name": "get_weather", "parameters": {}}]', [("get_weather", {})]),
        case("whitespace", f" \n\n [{oslo}]", [at("Oslo")]),
        case("multiple_commas", f"[{oslo},{oslo},{oslo}]", [at("Oslo")] * 3),
        case("trailing_comma", f"[{oslo}, {call('Bergen')}]", [at("Oslo"), at("Bergen")]),
        case(
            "three_tool_calls",
            f"[{oslo},{search},{oslo}]",
            [at("Oslo"), ("search", {"query": "q"}), at("Oslo")],
        ),
        Case(
            "parallel:JsonArray.array_parameters",
            "json_array",
            f"[\n  {docs},\n  {docs}]",
            [("search_docs", {"title": ["7.8"], "filename": "d"})] * 2,
            "",
            DOCS,
        ),
        Case(
            "parallel:JsonArray.simple",
            "json_array",
            f"[\n  {docs},\n  {docs}\n]",
            [("search_docs", {"title": ["7.8"], "filename": "d"})] * 2,
            "",
            DOCS,
        ),
    ]


def minimax_cases() -> list[Case]:
    def case(
        name: str, text: str, calls: Sequence[Call], content: str | None = "", **more: Any
    ) -> Case:
        return Case(f"minimax_m2:{name}", "minimax-m2", text, calls, content, MINIMAX, **more)

    def invoke(name: str, key: str, value: str) -> str:
        return f'<invoke name="{name}"><parameter name="{key}">{value}</parameter></invoke>'

    def call(name: str, key: str, value: str) -> str:
        return f"<minimax:tool_call>{invoke(name, key, value)}</minimax:tool_call>"

    closing = "It has </parameter> in it"
    return [
        case(
            "anyof_preserves_string", call("nullable", "args", "hi"), [("nullable", {"args": "hi"})]
        ),
        case(
            "anyof_explicit_null", call("nullable", "args", "null"), [("nullable", {"args": None})]
        ),
        case(
            "incomplete_tool_call",
            "[Text]<minimax:tool_call>" + invoke("info", "short", "false"),
            [("info", {"short": False})],
            "[Text]",
        ),
        case(
            "complete_tool_call",
            "Before." + call("info", "short", "true") + "After.",
            [("info", {"short": True})],
            "Before.After.",
        ),
        case(
            "closing_tag_substring",
            call("write", "content", closing),
            [("write", {"content": closing})],
        ),
        case(
            "xml_content",
            call("write", "content", "<div>Hi</div>"),
            [("write", {"content": "<div>Hi</div>"})],
        ),
        case(
            "streaming_incomplete",
            "Before<minimax:tool_call>"
            + invoke("info", "short", "false").removesuffix("</invoke>"),
            [],
            "Before",
            cut=("info", '{"short": false'),
        ),
        case(
            "streaming_complete",
            "Before " + call("info", "short", "true") + " After",
            [("info", {"short": True})],
            "Before After",
        ),
        case(
            "anyof_object_and_null",
            call("data", "data", '{"key": "value"}'),
            [("data", {"data": {"key": "value"}})],
        ),
        case(
            "array_type",
            call("items", "items", '[1, 2, "four"]'),
            [("items", {"items": [1, 2, "four"]})],
        ),
    ]
