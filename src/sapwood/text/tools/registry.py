# ruff: noqa: RUF001 - the wide bars are the formats' own
"""Tool-call formats by name, and which of them a model uses."""

from __future__ import annotations

import re

from sapwood.base.registry import Registry
from sapwood.text.tools.format import ToolFormat

_ROOM = "sapwood.text.tools"

TOOL_FORMATS: Registry[type[ToolFormat]] = Registry(
    "tool-call parser",
    {
        "deepseekv3": f"{_ROOM}.deepseekv3:DeepSeekV3",
        "deepseekv31": f"{_ROOM}.deepseekv31:DeepSeekV31",
        "deepseekv32": f"{_ROOM}.deepseekv32:DeepSeekV32",
        "generic": f"{_ROOM}.generic:Generic",
        "glm": f"{_ROOM}.glm45:Glm45",
        "glm45": f"{_ROOM}.glm45:Glm45",
        "glm47": f"{_ROOM}.glm47:Glm47",
        "gpt-oss": f"{_ROOM}.harmony:Harmony",
        "interns1": f"{_ROOM}.interns1:InternS1",
        "json_array": f"{_ROOM}.json_array:JsonArray",
        "kimi_k2": f"{_ROOM}.kimi_k2:KimiK2",
        "llama3": f"{_ROOM}.llama3:Llama3",
        "mimo": f"{_ROOM}.mimo:MiMo",
        "minimax-m2": f"{_ROOM}.minimax_m2:MiniMaxM2",
        "mistral": f"{_ROOM}.mistral:Mistral",
        "pythonic": f"{_ROOM}.pythonic:Pythonic",
        "qwen": f"{_ROOM}.qwen25:Qwen25",
        "qwen25": f"{_ROOM}.qwen25:Qwen25",
        "qwen3_coder": f"{_ROOM}.qwen3_coder:Qwen3Coder",
        "step3": f"{_ROOM}.step3:Step3",
        "trinity": f"{_ROOM}.trinity:Trinity",
    },
    entry_point="sapwood.tool_call_parsers",
)

_MARKS: tuple[tuple[str, str], ...] = (
    (r"｜DSML｜", "deepseekv32"),
    (r"tool▁calls▁begin[\s\S]*```json", "deepseekv3"),
    (r"tool▁calls▁begin", "deepseekv31"),
    (r"<arg_key>[\s\S]*\\n<arg_value>|\n<arg_key>", "glm45"),
    (r"<arg_key>", "glm47"),
    (r"<\|tool_calls_section_begin\|>", "kimi_k2"),
    (r"<minimax:tool_call>", "minimax-m2"),
    (r"<steptml:invoke", "step3"),
    (r"<\|action_start\|>", "interns1"),
    (r"<\|channel\|>", "gpt-oss"),
    (r"<function=", "qwen3_coder"),
    (r"<tool_call>", "qwen25"),
    (r"\[TOOL_CALLS\]", "mistral"),
    (r"<\|python_start\|>|\[func_name1\(", "pythonic"),
    (r"<\|python_tag\|>|\"parameters\": dictionary of argument", "llama3"),
)
"""A pattern that only one format's chat templates have, and that format; the first match counts."""


def format_of_template(source: str) -> str | None:
    """Name of the format in which a chat template writes calls; None if it writes none."""
    return next((name for mark, name in _MARKS if re.search(mark, source)), None)
