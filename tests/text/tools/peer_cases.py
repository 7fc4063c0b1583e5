# ruff: noqa: RUF001 - the wide bars are the formats' own
"""What SGLang's tests of its detectors demand, as data: which text, which calls, which content.

A case has the name of SGLang's test, the texts are our own. Parts of a test that look at SGLang's
insides (buffers, indexes) have no case, nor do detectors of formats that are not read here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Call = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """
    name     file and test of SGLang's, and what tells cases of one test apart
    text     what the model writes
    calls    the calls that SGLang's test asks for
    content  the content that it asks for, white space at the ends aside; None: it does not say
    cut      name of the call in which the text is cut off, and the beginning of its arguments
    differs  key of the reason in docs/tool-calls.md if sapwood reads something else; "" if not
    """

    name: str
    parser: str
    text: str
    calls: Sequence[Call] = ()
    content: str | None = None
    tools: dict[str, Any] = field(default_factory=dict)
    cut: tuple[str, str] | None = None
    keeps_unknown: bool = False
    differs: str = ""


def _object(required: Sequence[str] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


STR, INT, NUM = {"type": "string"}, {"type": "integer"}, {"type": "number"}
BOOL, ARR, OBJ = {"type": "boolean"}, {"type": "array"}, {"type": "object"}
NULLABLE = {"anyOf": [STR, {"type": "null"}]}
UNIT = {"type": "string", "enum": ["celsius", "fahrenheit"]}
# As SGLang's: without a type, and with arguments that the schema does not name.
PLACES = {
    "get_weather": {"properties": {"location": STR, "unit": UNIT}, "required": ["location"]},
    "search": {"properties": {"query": STR}, "required": ["query"]},
}
CITIES = {"get_weather": _object(["city"], city=STR), "get_sights": _object(["city"], city=STR)}
DATED = {"get_weather": _object(["city", "date"], city=STR, date=STR)}
TODOS = {"todo_write": _object(["todos"], todos=ARR)}
DECIDE = {"decide": _object(["decision", "content"], decision=STR, content=STR)}
DOCS = {"search_docs": _object(["title"], title={"type": "array", "items": STR})}
V32 = {
    "search": _object(["query"], query=STR, topn=INT, source={"type": "string", "enum": ["web"]}),
    "spot": _object(["city"], city=STR),
    "get_date": _object(),
    "write_note": _object(payload=OBJ),
}
CODER = {
    "weather": _object(["location"], location=STR, unit=UNIT, days=INT),
    "sql": _object(query=STR, dry_run=BOOL),
    "todo": _object(todos={"type": "array", "items": _object(content=STR, status=STR)}),
}
FILES = {
    "ReadFile": _object(["path"], path=STR),
    "get_weather": _object(["city"], city=STR, unit=STR),
    "list-files": _object(["path"], path=STR),
}
AGENT = {
    "Read": _object(["file_path"], file_path=STR, offset=NUM),
    "Write": _object(["file_path", "content"], file_path=STR, content=STR),
    "Glob": _object(["pattern"], pattern=STR, path=STR),
    "Grep": _object(["pattern"], pattern=STR, path=STR, output_mode=STR),
    "LS": _object(["path"], path=STR, ignore=ARR),
    "Ping": _object(),
}
EITHER = {
    "locate": {
        "type": "object",
        "anyOf": [
            {"properties": {"city": STR}, "required": ["city"]},
            {"properties": {"zip": STR}, "required": ["zip"]},
        ],
    },
    "query": _object(["q"], q=STR),
}
STRICT = {
    "delete": _object(["action"], action={"const": "delete"}),
    "dispatch": {"type": "object", "additionalProperties": STR},
}
MINIMAX = {
    "nullable": _object(["args"], args=NULLABLE),
    "info": _object(short=BOOL),
    "write": _object(content=STR),
    "data": _object(data={"anyOf": [_object(key=STR), {"type": "null"}]}),
    "items": _object(items=ARR),
}
READ = {"read_file": _object(files=ARR)}
HARMONY = {"get_weather": _object(location=STR, unit=STR), "get_temp": _object(location=STR)}

P, G, K, Q = "parser", "glm47", "kimik2", "qwen3_coder"


def _pythonic() -> list[Case]:
    def case(name: str, text: str, calls: Sequence[Call], content: str | None) -> Case:
        return Case(f"{P}:Pythonic.{name}", "pythonic", text, calls, content, PLACES)

    oslo = ("get_weather", {"location": "Oslo"})
    lists = ("get_weather", {"location": "Oslo", "data": [1, 2, 3]})
    between = "<|python_start|>[get_weather(location='Oslo', data=[1, 2, 3])]<|python_end|>"
    return [
        case("no_brackets", "Nothing is called here.", [], "Nothing is called here."),
        case(
            "complete_tool_call",
            "I call: [get_weather(location='Oslo', unit='celsius')]",
            [("get_weather", {"location": "Oslo", "unit": "celsius"})],
            "I call:",
        ),
        case("text_before_tool_call", "First [get_weather(location='Oslo')]", [oslo], "First"),
        case("partial_tool_call", "So: [get_weather(location='Oslo')]", [oslo], "So:"),
        case(
            "bracket_without_text_before",
            "[search(query='a b')]",
            [("search", {"query": "a b"})],
            "",
        ),
        case("text_after_tool_call", "[get_weather(location='Oslo')] It says:", [oslo], "It says:"),
        case(
            "multiple_tool_calls",
            "[get_weather(location='Oslo')] and [search(query='q')]",
            [oslo, ("search", {"query": "q"})],
            "and",
        ),
        case("opening_bracket_only", "One moment: [", [], "One moment: ["),
        case(
            "nested_brackets",
            "[get_weather(location='Oslo', unit='celsius', data=[1, 2, 3])]",
            [("get_weather", {"location": "Oslo", "unit": "celsius", "data": [1, 2, 3]})],
            "",
        ),
        case(
            "nested_brackets_dict",
            "[search(query='q', config={'options': [1, 2], 'more': {'a': 'b'}})]",
            [("search", {"query": "q", "config": {"options": [1, 2], "more": {"a": "b"}}})],
            "",
        ),
        case(
            "multiple_tools_with_nested_brackets",
            "[get_weather(location='Oslo', data=[1, 2, 3]), search(query='q', by=['a', 'b'])]",
            [lists, ("search", {"query": "q", "by": ["a", "b"]})],
            "",
        ),
        case("partial_nested_brackets", "So: " + between[16:-14], [lists], "So:"),
        case("streaming_python_start_and_end_token", f"So: {between}", [lists], "So:"),
        case("python_start_and_end_token", f"I ask. {between} I wait.", [lists], "I ask. I wait."),
    ]


def _mistral() -> list[Case]:
    def case(name: str, text: str, calls: Sequence[Call], content: str | None) -> Case:
        return Case(f"{P}:Mistral.{name}", "mistral", text, calls, content, DECIDE)

    call = ("decide", {"decision": "GO", "content": "at once"})
    arguments = '{"decision":"GO", "content":"at once"}'
    brackets = "```\nA: [City] - [Sky]\n```"
    return [
        case(
            "nested_brackets_in_content",
            '[TOOL_CALLS] [{"name":"decide", "arguments":{"decision":"",'
            '"content":"```\\nA: [City] - [Sky]\\n```"}}]',
            [("decide", {"decision": "", "content": brackets})],
            "",
        ),
        case(
            "simple_case",
            f'[TOOL_CALLS] [{{"name":"decide", "arguments":{arguments}}}]',
            [call],
            "",
        ),
        case("no_tool_calls", "Nothing is called here.", [], "Nothing is called here."),
        case(
            "text_before_tool_call",
            f'I decide: [TOOL_CALLS] [{{"name":"decide", "arguments":{arguments}}}]',
            [call],
            "I decide:",
        ),
        case("compact_args_format", f"[TOOL_CALLS]decide[ARGS]{arguments}", [call], ""),
        case("streaming_compact_args_format", f"[TOOL_CALLS]decide[ARGS]{arguments}", [call], ""),
    ]


def _json_between_tags() -> list[Case]:
    """Tests of the base class, whose detector of the test reads the format of Qwen 2.5."""

    def case(
        name: str, text: str, calls: Sequence[Call], content: str | None = "", **more: Any
    ) -> Case:
        return Case(name, "qwen25", text, calls, content, CITIES, **more)

    def call(name: str, city: str) -> str:
        return f'{{"name": "{name}", "arguments": {{"city": "{city}"}}}}'

    both = [("get_weather", {"city": "Oslo"}), ("get_sights", {"city": "Bergen"})]
    listed = f"{call(*_pair(both[0]))}, {call(*_pair(both[1]))}"
    unknown = '{"name": "nothing", "parameters": {"city": "Oslo"}}'
    cjk = [("get_weather", {"city": "北京"}), ("get_sights", {"city": "上海"})]
    return [
        case(f"{P}:Base.sequential_tool_index", f"<tool_call>{listed}</tool_call>", both),
        case(f"{P}:Base.buffer_content", f"<tool_call>{listed} </tool_call>", both),
        case(f"{P}:Base.current_tool_id", f"<tool_call>\n{listed}</tool_call>", both),
        case(f"{P}:Base.tool_name_streaming", f"<tool_call>[{listed}]</tool_call>", both),
        case(f"{P}:Base.invalid_tool", '<tool_call>{"name": "nothing", ', [], None),
        case(
            f"{P}:Base.chinese_characters",
            f"<tool_call>{call('get_weather', '北京')}</tool_call>",
            cjk[:1],
        ),
        case(
            f"{P}:Base.chinese_incremental",
            f"<tool_call>\n{call('get_weather', '北京')}</tool_call>",
            cjk[:1],
        ),
        case(
            f"{P}:Base.multiple_chinese",
            f"<tool_call>{call('get_weather', '北京')}, {call('get_sights', '上海')}</tool_call>",
            cjk,
        ),
        case(
            "parallel:Qwen25.two_tool_calls",
            f"<tool_call>\n{call('get_weather', 'Oslo')}\n</tool_call>\n"
            f"<tool_call>\n{call('get_sights', 'Bergen')}\n</tool_call>",
            both,
        ),
        case("unknown_tool_name:dropped", f"<tool_call>{unknown}</tool_call>", [], None),
        case(
            "unknown_tool_name:forwarded",
            f"<tool_call>{unknown}</tool_call>",
            [("nothing", {"city": "Oslo"})],
            keeps_unknown=True,
        ),
        Case(
            "trinity:calls_between_think_tags",
            "trinity",
            f"<think>Hm.\n<tool_call>\n{call('get_weather', '北京')}\n</tool_call></think>",
            cjk[:1],
            "Hm.",
            CITIES,
        ),
    ]


def _pair(call: Call) -> tuple[str, str]:
    return call[0], call[1]["city"]


def _llama() -> list[Case]:
    def case(name: str, text: str, calls: Sequence[Call], content: str | None = "") -> Case:
        return Case(f"{P}:Llama32.{name}", "llama3", text, calls, content, CITIES)

    one = '{"name": "get_weather", "parameters": {"city": "Oslo"}}'
    two = '{"name": "get_sights", "parameters": {"city": "Oslo"}}'
    oslo, sights = ("get_weather", {"city": "Oslo"}), ("get_sights", {"city": "Oslo"})
    bare = '{"name": "get_weather", "parameters": {}}'
    none = ("get_weather", {})
    tag = "<|python_tag|>"
    return [
        case("single_json", one, [oslo]),
        case("multiple_json_with_separator", f"{tag}{one};{two}", [oslo, sights]),
        case("multiple_json_with_separator_customized", f"{tag}{one}{tag}{two}", [oslo, sights]),
        case("json_with_trailing_text", f"{bare} What follows", [none], "What follows"),
        case("invalid_then_valid_json", bare[:-2] + "{" + bare, [none], None),
        case("plain_text_only", "Nothing is called here.", [], "Nothing is called here."),
        case("with_python_tag_prefix", f"To begin with. {tag}{bare}", [none], "To begin with."),
        case(
            "python_dict (detector)",
            "{'name': 'get_weather', 'parameters': {'city': 'Oslo'}}",
            [oslo],
        ),
    ]


_KB, _KE = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"


def _kimi_call(call_id: str, arguments: str) -> str:
    return f"<|tool_call_begin|>{call_id}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


def _kimi() -> list[Case]:
    def case(
        name: str,
        text: str,
        calls: Sequence[Call] = (),
        content: str | None = "",
        tools: dict[str, Any] = FILES,
        **more: Any,
    ) -> Case:
        return Case(name, "kimi_k2", text, calls, content, tools, **more)

    def section(*calls: tuple[str, str]) -> str:
        return _KB + "".join(_kimi_call(*call) for call in calls) + _KE

    oslo, a = '{"city": "Oslo"}', '{"path": "/a"}'
    read, rain = ("ReadFile", {"path": "/a"}), ("get_weather", {"city": "Oslo"})
    both = section(("functions.ReadFile:0", a), ("functions.get_weather:1", oslo))
    apart = section(("functions.ReadFile:0", a)) + section(("functions.get_weather:1", oslo))
    only = {"search": _object(["path"], path=STR)}
    bare = f"{K}:BareCounter"
    client = f"{K}:ClientStyleId"
    strict = f"{K}:NameInference"
    ids = ("call_3", "call_7f3a9c2b", "toolu_01AkmjoowNg", "0b3d1c2e-4f5a-6b7c")
    cases = [
        case(f"{P}:KimiK2.single_tool_call", section(("functions.get_weather:0", oslo)), [rain]),
        case(f"{P}:KimiK2.multiple_tool_calls", both, [read, rain]),
        case(f"{P}:KimiK2.streaming_tool_call", section(("functions.ReadFile:0", a)), [read]),
        case(f"{P}:KimiK2.streaming_multiple_tool_calls", both, [read, rain]),
        case(f"{P}:KimiK2.tool_call_completion", section(("functions.ReadFile:0", a)), [read]),
        case(
            f"{P}:KimiK2.tool_name_streaming",
            _KB
            + _kimi_call("functions.ReadFile:0", a)
            + _kimi_call("functions.get_weather:1", "{")[:-17],
            [read],
            cut=("get_weather", "{"),
        ),
        case(
            f"{P}:KimiK2.invalid_tool_call",
            f"nothing:0<|tool_call_argument_begin|>{oslo}<|tool_call_end|>{_KE}",
            [],
            f"nothing:0{oslo}",
        ),
        case(
            f"{P}:KimiK2.partial_tool_call",
            _KB + _kimi_call("functions.get_weather:0", '{"city": "Oslo"')[:-17],
            cut=("get_weather", '{"city": "Oslo"'),
        ),
        case(f"{K}:Basic.single_tool_call", section(("functions.ReadFile:0", a)), [read]),
        case(f"{K}:Basic.multiple_tool_calls", both, [read, rain]),
        case(
            f"{K}:Basic.tool_index_is_local",
            section(("functions.ReadFile:5", a), ("functions.get_weather:6", oslo)),
            [read, rain],
        ),
        case(
            f"{K}:Basic.normal_text_before",
            "I look." + section(("functions.ReadFile:0", a)),
            [read],
            "I look.",
        ),
        case(f"{K}:Basic.no_tool_call", "Nothing is called.", [], "Nothing is called."),
        case(
            f"{K}:Hyphenated.non_streaming",
            section(("functions.list-files:0", a)),
            [("list-files", {"path": "/a"})],
        ),
        case(
            f"{K}:Hyphenated.streaming",
            section(("functions.list-files:0", a)),
            [("list-files", {"path": "/a"})],
        ),
        case(f"{K}:Streaming.trailing_left_angle", "some text <", [], "some text <"),
        case(f"{K}:Streaming.single_tool_call", section(("functions.ReadFile:0", a)), [read]),
        case(f"{K}:Streaming.multiple_tool_calls", both, [read, rain]),
        case(f"{K}:Streaming.state_reset", section(("functions.ReadFile:0", a)), [read]),
        case(f"{K}:Leakage.non_tool_text", f"some text{_KE}", [], "some text"),
        case(
            f"{K}:Leakage.argument_begin_token",
            "text<|tool_call_argument_begin|>more",
            [],
            "textmore",
        ),
        case(f"{K}:EndToEnd.text_then_call", "So:" + both, [read, rain], "So:"),
        case(f"{K}:EndToEnd.two_sections", "So:" + apart, [read, rain], "So:"),
        case(
            f"{K}:EndToEnd.text_between_calls",
            "So:"
            + section(("functions.ReadFile:0", a))
            + " And then: "
            + section(("functions.get_weather:1", oslo)),
            [read, rain],
            "So: And then:",
        ),
        case(
            f"{K}:EndToEnd.unparsable_tool_id",
            "So." + section(("weird@id", '{"nothing": 1}')) + section(("functions.ReadFile:0", a)),
            [read],
            None,
        ),
        case(
            f"{K}:EndToEnd.malformed_json_passes_through",
            section(("functions.get_weather:0", oslo))
            + section(("functions.get_weather:1", '{"city": "X", "valid": fasle'))
            + section(("functions.get_weather:2", oslo)),
            [rain, ("get_weather", {}), rain],
            differs="broken-json",
        ),
        case(
            f"{K}:IndexCompliance.single_call",
            section(("functions.get_weather:5", oslo)),
            [rain],
        ),
        case(
            f"{K}:IndexCompliance.multi_call",
            section(("functions.get_weather:7", oslo)) + section(("functions.ReadFile:8", a)),
            [rain, read],
        ),
        case(
            f"{K}:IndexCompliance.continuation", section(("functions.get_weather:10", oslo)), [rain]
        ),
        case(
            f"{K}:IndexCompliance.three_calls",
            "".join(section((f"functions.get_weather:{number}", oslo)) for number in (10, 11, 12)),
            [rain] * 3,
        ),
        case(f"{K}:IndexCompliance.bare_counter", section(("5", oslo)), [rain]),
        case(f"{bare}.prefix", section(("functions.ReadFile:0", a)), [read]),
        case(f"{bare}.without_prefix", section(("ReadFile:1", a)), [read]),
        case(
            f"{bare}.single_tool",
            section(("3", '{"query": "q"}')),
            [("search", {"query": "q"})],
            tools=only,
        ),
        case(f"{bare}.infers_by_args", section(("0", oslo)), [rain]),
        case(f"{bare}.no_tools", section(("5", '{"x": 1}')), [], None, {}),
        case(f"{bare}.unexpected_format", section(("some_garbage", '{"x": 1}')), [], None),
        case(
            f"{bare}.argument_overlap",
            section(("0", '{"city": "Oslo", "unit": "celsius"}')),
            [("get_weather", {"city": "Oslo", "unit": "celsius"})],
        ),
        case(f"{bare}.malformed_json", section(("0", '{"city": "Os')), [], None),
        case(f"{bare}.no_matching_props", section(("0", '{"x": 1}')), [], None),
        case(f"{bare}.skips_unknown", section(("0", '{"unknown_key": "v"}')), [], None),
        case(
            f"{bare}.streaming_single_tool",
            section(("0", a)),
            [("search", {"path": "/a"})],
            tools=only,
        ),
        case(f"{client}.multiple_calls", section(("call_3", oslo), ("call_4", oslo)), [rain, rain]),
        case(
            f"{client}.mixed_with_standard",
            section(("toolu_01Ak", oslo), ("functions.ReadFile:7", a)),
            [rain, read],
        ),
        case(f"{client}.unresolvable_is_dropped", section(("call_3", '{"unknown": 1}')), [], None),
        case(f"{client}.prefix_kept", "I look.\n" + section(("call_3", oslo)), [rain], "I look."),
        case(
            f"{client}.single_tool",
            section(("toolu_01", a)),
            [("search", {"path": "/a"})],
            tools=only,
        ),
        case(
            f"{client}.unresolvable_skips_only_that_section",
            section(("call_3", '{"unknown": 1}'), ("call_4", oslo)),
            [rain],
            "",
            differs="unread-stays",
        ),
        *(case(f"{client}.id {each}", section((each, oslo)), [rain]) for each in ids),
    ]
    told = [
        ('{"file_path": "/x"}', "Read"),
        ('{"file_path": "/x", "content": "c"}', "Write"),
        ('{"path": "/x"}', "LS"),
        ('{"pattern": "a", "output_mode": "c"}', "Grep"),
        ("{}", "Ping"),
    ]
    untold = [
        '{"pattern": "a", "path": "/x"}',
        '{"content": "c"}',
        '{"file_path": "/x", "bogus": 1}',
        "[1, 2]",
        '{"path": 5}',
    ]
    cases += [
        case(
            f"{strict}.required_keys {name}",
            section(("0", text)),
            [(name, json.loads(text))],
            tools=AGENT,
        )
        for text, name in told
    ]
    cases += [
        case(f"{strict}.not_told {text}", section(("call_3", text)), [], None, AGENT)
        for text in untold
    ]
    cases += [
        case(
            f"{strict}.single_tool_unchecked",
            section(("0", '{"bogus": 1}')),
            [("Read", {"bogus": 1})],
            tools={"Read": AGENT["Read"]},
        ),
        case(f"{strict}.composite_not_told", section(("0", "{}")), [], None, EITHER),
        case(
            f"{strict}.composite",
            section(("0", '{"zip": "94110"}')),
            [("locate", {"zip": "94110"})],
            tools=EITHER,
        ),
        case(
            f"{strict}.value_constraints",
            section(("0", '{"action": "read"}')),
            [("dispatch", {"action": "read"})],
            tools=STRICT,
        ),
        case(
            f"{strict}.values_ambiguous", section(("0", '{"action": "delete"}')), [], None, STRICT
        ),
        case(f"{strict}.value_of_wrong_type", section(("0", '{"action": 5}')), [], None, STRICT),
        case(
            f"{strict}.ambiguous_section_is_skipped",
            section(("call_3", '{"pattern": "a", "path": "/x"}'), ("call_4", '{"path": "/y"}')),
            [("LS", {"path": "/y"})],
            "",
            AGENT,
            differs="unread-stays",
        ),
    ]
    return cases


def _dsml(*invokes: str) -> str:
    return "<｜DSML｜function_calls>\n" + "\n".join(invokes) + "\n</｜DSML｜function_calls>"


def _invoke(name: str, body: str) -> str:
    return f'<｜DSML｜invoke name="{name}">\n{body}\n</｜DSML｜invoke>'


def _parameter(name: str, value: str, *, is_text: bool = True) -> str:
    tag = f'<｜DSML｜parameter name="{name}" string="{json.dumps(is_text)}">'
    return f"{tag}{value}</｜DSML｜parameter>"


def _deepseek() -> list[Case]:
    def v32(name: str, text: str, calls: Sequence[Call], content: str | None = "") -> Case:
        return Case(name, "deepseekv32", text, calls, content, V32)

    v3_call = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
    v31_call = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
    oslo, bergen = '{"city": "Oslo"}', '{"city": "Bergen"}'
    two = [("get_weather", {"city": "Oslo"}), ("get_sights", {"city": "Bergen"})]
    begin, end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    v31_two = (
        begin + v31_call.format("get_weather", oslo) + v31_call.format("get_sights", bergen) + end
    )
    spot = ("spot", {"city": "Oslo"})
    search = ("search", {"query": "wood", "topn": 10, "source": "web"})
    spaced = "\n\n            "
    elements = _dsml(
        _invoke("spot", spaced + _parameter("city", "Oslo") + spaced),
        _invoke(
            "search",
            spaced.join(
                (
                    _parameter("query", "wood"),
                    _parameter("topn", "10", is_text=False),
                    _parameter("source", "web"),
                )
            ),
        ),
    )
    bodies = _dsml(
        _invoke("spot", '{\n  "city": "Oslo"\n}'),
        _invoke("search", '{"query": "wood", "topn": 10, "source": "web"}'),
    )
    prose = "Здравствуйте, мир! Это тест"
    bare = '<｜DSML｜invoke name="spot">' + _parameter("city", "Oslo") + "</｜DSML｜invoke>"
    preamble = "deepseekv32:StreamingPreamble"
    return [
        Case(
            f"{P}:DeepSeekV3.multi_token_chunk",
            "deepseekv3",
            begin
            + v3_call.format("get_weather", oslo)
            + "\n"
            + v3_call.format("get_sights", bergen)
            + end,
            two,
            "",
            CITIES,
        ),
        Case("deepseekv31:delta_spanning_two_calls", "deepseekv31", v31_two, two, "", CITIES),
        Case(
            "deepseekv31:complete_call_in_single_delta",
            "deepseekv31",
            begin + v31_call.format("get_weather", oslo) + end,
            two[:1],
            "",
            CITIES,
        ),
        Case("deepseekv31:arguments_progressively", "deepseekv31", v31_two, two, "", CITIES),
        Case("deepseekv31:one_shot_parse", "deepseekv31", v31_two, two, "", CITIES),
        v32(
            f"{P}:DeepSeekV32.xml_format",
            f"I look it up.\n\n{elements}\n",
            [spot, search],
            "I look it up.",
        ),
        v32(
            f"{P}:DeepSeekV32.json_format",
            f"I look it up.\n\n{bodies}\n",
            [spot, search],
            "I look it up.",
        ),
        v32(
            f"{P}:DeepSeekV32.streaming_xml_format",
            _dsml(
                _invoke(
                    "spot",
                    _parameter("city", "Oslo")
                    + _parameter("other", "Bergen")
                    + _parameter("topn", "10", is_text=False)
                    + _parameter("obj", '{"name": "Kari", "age": 30}', is_text=False),
                )
            ),
            [
                (
                    "spot",
                    {
                        "city": "Oslo",
                        "other": "Bergen",
                        "topn": 10,
                        "obj": {"name": "Kari", "age": 30},
                    },
                )
            ],
        ),
        v32(f"{P}:DeepSeekV32.streaming_json_format", _dsml(_invoke("spot", oslo)), [spot]),
        v32(
            f"{P}:DeepSeekV32.no_parameters",
            "I look.\n\n" + _dsml('<｜DSML｜invoke name="get_date">\n</｜DSML｜invoke>'),
            [("get_date", {})],
            "I look.",
        ),
        v32(
            f"{P}:DeepSeekV32.streaming_no_parameters",
            _dsml('<｜DSML｜invoke name="get_date"></｜DSML｜invoke>'),
            [("get_date", {})],
        ),
        v32(
            f"{P}:DeepSeekV32.no_parameters_with_whitespace",
            _dsml(_invoke("get_date", "\n")),
            [("get_date", {})],
        ),
        v32(
            "deepseekv32:self_closing_invoke",
            _dsml('<｜DSML｜invoke name="get_date"/>', '<｜DSML｜invoke name="get_date" />'),
            [("get_date", {})] * 2,
        ),
        v32(
            "deepseekv32:NonJsonObjectParam.no_parser_error",
            _dsml(_invoke("write_note", _parameter("payload", prose, is_text=False))),
            [("write_note", {"payload": prose})],
        ),
        v32(
            "deepseekv32:JsonParamUnchanged",
            _dsml(_invoke("write_note", _parameter("payload", '{"city": "Oslo"}', is_text=False))),
            [("write_note", {"payload": {"city": "Oslo"}})],
        ),
        v32(f"{preamble}.wrapped", "I ask." + _dsml(bare), [spot], "I ask."),
        v32(f"{preamble}.bare_invoke", "I ask." + bare, [spot], "I ask."),
        v32(f"{preamble}.multiple_invokes", "I ask." + _dsml(bare, bare), [spot, spot], "I ask."),
        v32(f"{preamble}.literal_angle", "Is 3 < 5? Yes.", [], "Is 3 < 5? Yes."),
        v32(
            f"{preamble}.literal_angle_before_call", "If 3 < 5: " + _dsml(bare), [spot], "If 3 < 5:"
        ),
    ]


def _qwen3_coder() -> list[Case]:
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


def _glm() -> list[Case]:
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


def _json_array() -> list[Case]:
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


def _minimax() -> list[Case]:
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


def _gpt_oss() -> list[Case]:
    def case(
        name: str, text: str, calls: Sequence[Call], content: str | None = "", **more: Any
    ) -> Case:
        return Case(name, "gpt-oss", text, calls, content, {**READ, **HARMONY}, **more)

    def call(name: str, arguments: str, constrain: str = "") -> str:
        return f"<|channel|>commentary to=functions.{name}{constrain}<|message|>{arguments}<|call|>"

    thought = "<|channel|>analysis<|message|>Hm.<|end|>"
    final = "<|start|>assistant<|channel|>final<|message|>{}<|return|>"
    as_json = " <|constrain|>json"
    files = "<|start|>assistant" + call("read_file", '{\n  "files": []\n}', as_json)
    read = ("read_file", {"files": []})
    oslo = ("get_weather", {"location": "Oslo"})
    weather = call("get_weather", '{"location":"Oslo"}')
    other = call("get_temp", '{"location":"Bergen"}')
    both = [oslo, ("get_temp", {"location": "Bergen"})]
    h, s = "harmony:Canonical", "harmony:Scenarios"
    return [
        case(
            "gpt_oss:truncate_normal",
            thought + files + final.format("This comes after."),
            [read],
            "",
            differs="text-after-calls",
        ),
        case(
            "gpt_oss:streaming_truncate_normal",
            thought + files + final.format("This comes after.")[:-10],
            [read],
            "",
            differs="text-after-calls",
        ),
        case(
            "gpt_oss:fast_path",
            files + "This comes after.",
            [read],
            "",
            differs="text-after-calls",
        ),
        case(f"{h}.single_analysis_block", thought, [], "Hm."),
        case(
            f"{h}.single_commentary_block",
            "<|channel|>commentary<|message|>For you<|end|>",
            [],
            "For you",
        ),
        case(f"{h}.single_final_block", final.format("It is 42"), [], "It is 42"),
        case(f"{h}.tool_call_commentary", weather, [oslo]),
        case(
            f"{h}.tool_call_analysis (built in)",
            '<|channel|>analysis to=browser.search<|message|>{"query": "q"}<|call|>',
            [],
            None,
        ),
        case(f"{h}.complex_sequence", thought + "<|start|>assistant" + weather, [oslo], "Hm."),
        case(
            f"{h}.interspersed_text",
            "Some text " + thought + " more text " + final.format("answer") + " trailing text",
            [],
            "Some textHm. more textanswer trailing text",
        ),
        case(f"{h}.incomplete_block", "<|channel|>analysis<|message|>partial", [], "partial"),
        case(f"{h}.partial_token_suffix", "complete text <|ret", [], "complete text <|ret"),
        case(
            f"{h}.tool_response_message",
            '<|start|>functions.get_weather to=assistant<|message|>{"sunny": true}<|end|>',
            [],
            '{"sunny": true}',
        ),
        case(f"{h}.empty_content_blocks", "<|channel|>analysis<|message|><|end|>", [], ""),
        case(f"{h}.commentary_filler", weather + "commentary" + other, both),
        case(
            "harmony:Parser.streaming_commentary_filler",
            weather + "commentary" + other + "commentary" + final.format("Done"),
            both,
            "Done",
        ),
        case(
            "harmony:Parser.repetitive_tool_calls",
            thought
            + "<|start|>assistant"
            + "commentary".join([weather] * 3)
            + thought
            + final.format("No."),
            [oslo] * 3,
            "Hm.Hm.No.",
        ),
        case(f"{s}.complete_reasoning_flow", thought + final.format("4."), [], "Hm.4."),
        case(
            f"{s}.tool_call_sequence",
            thought + "<|start|>assistant" + call("get_weather", '{"location":"Oslo"}', as_json),
            [oslo],
            "Hm.",
        ),
        case(
            f"{s}.preamble_sequence",
            thought
            + "<|start|>assistant<|channel|>commentary<|message|>My plan<|end|><|start|>assistant"
            + weather,
            [oslo],
            "Hm.My plan",
        ),
        case(
            f"{s}.tool_response_handling",
            "<|start|>functions.get_weather to=assistant<|channel|>commentary"
            '<|message|>{"sunny": true}<|end|>',
            [],
            '{"sunny": true}',
        ),
        case(
            "harmony:Edge.mixed_unknown_tokens", "a <|weird|> b " + thought, [], "a <|weird|> bHm."
        ),
        case("harmony:Edge.consecutive_blocks", thought + thought, [], "Hm.Hm."),
        case(
            "harmony:Edge.stray_tokens",
            final.format("Done") + "<|call|><|end|><|message|>",
            [],
            "Done",
        ),
        case(
            "harmony:Buffer.tool_call_chunk_boundary",
            call("get_weather", '{"location":"Oslo","unit":"celsius"}') + final.format("Done"),
            [("get_weather", {"location": "Oslo", "unit": "celsius"})],
            "Done",
        ),
    ]


CASES = [
    *_pythonic(),
    *_mistral(),
    *_json_between_tags(),
    *_llama(),
    *_kimi(),
    *_deepseek(),
    *_qwen3_coder(),
    *_glm(),
    *_json_array(),
    *_minimax(),
    *_gpt_oss(),
]
