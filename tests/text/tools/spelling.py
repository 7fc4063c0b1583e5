# ruff: noqa: RUF001 - the wide bars are the formats' own
"""Calls as each model writes them, written down apart from the parsers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

Call = tuple[str, dict[str, Any]]
Speller = Callable[[Sequence[Call]], str]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _bare(value: Any) -> str:
    return value if isinstance(value, str) else _json(value)


def qwen25(calls: Sequence[Call]) -> str:
    one = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'
    return "\n".join(one.format(name, _json(arguments)) for name, arguments in calls)


def deepseekv3(calls: Sequence[Call]) -> str:
    one = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
    inner = "\n".join(one.format(name, _json(arguments)) for name, arguments in calls)
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def deepseekv31(calls: Sequence[Call]) -> str:
    one = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
    inner = "".join(one.format(name, _json(arguments)) for name, arguments in calls)
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def deepseekv32(calls: Sequence[Call]) -> str:
    lines = ["<｜DSML｜function_calls>"]
    for name, arguments in calls:
        lines.append(f'<｜DSML｜invoke name="{name}">')
        for key, value in arguments.items():
            is_text = _json(isinstance(value, str))
            lines.append(
                f'<｜DSML｜parameter name="{key}" string="{is_text}">{_bare(value)}'
                "</｜DSML｜parameter>"
            )
        lines.append("</｜DSML｜invoke>")
    return "\n".join([*lines, "</｜DSML｜function_calls>"])


def glm45(calls: Sequence[Call]) -> str:
    parts = []
    for name, arguments in calls:
        pairs = [
            f"<arg_key>{key}</arg_key>\n<arg_value>{_bare(value)}</arg_value>\n"
            for key, value in arguments.items()
        ]
        parts.append(f"<tool_call>{name}\n{''.join(pairs)}</tool_call>")
    return "\n".join(parts)


def glm47(calls: Sequence[Call]) -> str:
    parts = []
    for name, arguments in calls:
        pairs = [
            f"<arg_key>{key}</arg_key><arg_value>{_bare(value)}</arg_value>"
            for key, value in arguments.items()
        ]
        parts.append(f"<tool_call>{name}{''.join(pairs)}</tool_call>")
    return "".join(parts)


def gpt_oss(calls: Sequence[Call]) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
        f"{_json(arguments)}<|call|>"
        for name, arguments in calls
    )


def kimi_k2(calls: Sequence[Call]) -> str:
    inner = "".join(
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>"
        f"{_json(arguments)}<|tool_call_end|>"
        for index, (name, arguments) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


def llama3(calls: Sequence[Call]) -> str:
    one = '{{"name": "{}", "parameters": {}}}'
    return "<|python_tag|>" + "; ".join(one.format(name, _json(args)) for name, args in calls)


def qwen3_coder(calls: Sequence[Call]) -> str:
    parts = []
    for name, arguments in calls:
        pairs = [
            f"<parameter={key}>\n{_bare(value)}\n</parameter>\n" for key, value in arguments.items()
        ]
        parts.append(f"<tool_call>\n<function={name}>\n{''.join(pairs)}</function>\n</tool_call>")
    return "\n".join(parts)


def mimo(calls: Sequence[Call]) -> str:
    parts = []
    for name, arguments in calls:
        pairs = [f"<parameter={key}>{_bare(value)}</parameter>" for key, value in arguments.items()]
        parts.append(f"<tool_call><function={name}>{''.join(pairs)}</function></tool_call>")
    return "\n".join(parts)


def json_list(calls: Sequence[Call]) -> str:
    return _json([{"name": name, "arguments": arguments} for name, arguments in calls])


def mistral(calls: Sequence[Call]) -> str:
    return f"[TOOL_CALLS] {json_list(calls)}"


def mistral_named(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{_json(arguments)}" for name, arguments in calls)


def pythonic(calls: Sequence[Call]) -> str:
    inner = ", ".join(
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
        for name, arguments in calls
    )
    return f"[{inner}]"


def step3(calls: Sequence[Call]) -> str:
    inner = "\n".join(
        f'<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="{name}">\n'
        + "".join(
            f'<steptml:parameter name="{key}">{_bare(value)}</steptml:parameter>\n'
            for key, value in arguments.items()
        )
        + "</steptml:invoke><｜tool_call_end｜>"
        for name, arguments in calls
    )
    return f"<｜tool_calls_begin｜>\n{inner}\n<｜tool_calls_end｜>"


def minimax_m2(calls: Sequence[Call]) -> str:
    inner = "\n".join(
        f'<invoke name="{name}">\n'
        + "".join(
            f'<parameter name="{key}">{_bare(value)}</parameter>\n'
            for key, value in arguments.items()
        )
        + "</invoke>"
        for name, arguments in calls
    )
    return f"<minimax:tool_call>\n{inner}\n</minimax:tool_call>"


def interns1(calls: Sequence[Call]) -> str:
    one = '<|action_start|> <|plugin|>\n{{"name": "{}", "parameters": {}}}<|action_end|>'
    return "\n".join(one.format(name, _json(arguments)) for name, arguments in calls)


def json_array(calls: Sequence[Call]) -> str:
    return _json([{"name": name, "parameters": arguments} for name, arguments in calls])


def generic(calls: Sequence[Call]) -> str:
    return f"<tool_call>{json_list(calls)}</tool_call>"


def generic_apart(calls: Sequence[Call]) -> str:
    return qwen25(calls)


def generic_fenced(calls: Sequence[Call]) -> str:
    return f"<tool_call>\n```json\n{json_list(calls)}\n```\n</tool_call>"


def generic_without_tags(calls: Sequence[Call]) -> str:
    return json_list(calls)


def generic_fence_alone(calls: Sequence[Call]) -> str:
    objects = (_json({"name": name, "arguments": arguments}) for name, arguments in calls)
    return "```json\n" + "\n".join(objects) + "\n```"


WHOLE_ANSWERS = (json_array, generic_without_tags, generic_fence_alone)
"""What is a call only where it is the whole answer."""


SPELLERS: dict[str, list[Speller]] = {
    "deepseekv3": [deepseekv3],
    "deepseekv31": [deepseekv31],
    "deepseekv32": [deepseekv32],
    "generic": [
        generic,
        generic_apart,
        generic_fenced,
        generic_without_tags,
        generic_fence_alone,
    ],
    "glm45": [glm45],
    "glm47": [glm47],
    "gpt-oss": [gpt_oss],
    "interns1": [interns1],
    "json_array": [json_array],
    "kimi_k2": [kimi_k2],
    "llama3": [llama3],
    "mimo": [mimo],
    "minimax-m2": [minimax_m2],
    "mistral": [mistral, mistral_named],
    "pythonic": [pythonic],
    "qwen25": [qwen25],
    "qwen3_coder": [qwen3_coder],
    "step3": [step3],
    "trinity": [qwen25],
}
