# ruff: noqa: RUF001 - the wide bars are the formats' own
"""Calls of Kimi K2 and of DeepSeek."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tests.text.tools.peer_cases.case import (
    AGENT,
    CITIES,
    EITHER,
    FILES,
    STR,
    STRICT,
    V32,
    Call,
    Case,
    K,
    P,
    _object,
)

_KB, _KE = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"


def _kimi_call(call_id: str, arguments: str) -> str:
    return f"<|tool_call_begin|>{call_id}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


def kimi_cases() -> list[Case]:
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


def deepseek_cases() -> list[Case]:
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
