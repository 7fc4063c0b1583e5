"""Calls as Python, as JSON after a mark or between tags, and in harmony's channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.text.tools.peer_cases.case import (
    CITIES,
    DECIDE,
    HARMONY,
    PLACES,
    READ,
    Call,
    Case,
    P,
)


def pythonic_cases() -> list[Case]:
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


def mistral_cases() -> list[Case]:
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


def json_between_tags_cases() -> list[Case]:
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


def llama_cases() -> list[Case]:
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


def gpt_oss_cases() -> list[Case]:
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
