"""The formats of thinking by name, and which of them a model uses."""

from __future__ import annotations

import re

from sapwood.base.registry import Registry
from sapwood.text.reasoning.format import ReasoningFormat

_ROOM = "sapwood.text.reasoning"

REASONING_FORMATS: Registry[ReasoningFormat] = Registry(
    "reasoning parser",
    {
        "deepseek-r1": f"{_ROOM}.think:DEEPSEEK_R1",
        "deepseek-v3": f"{_ROOM}.think:DEEPSEEK_V3",
        "glm45": f"{_ROOM}.think:GLM45",
        "gpt-oss": f"{_ROOM}.gpt_oss:GPT_OSS",
        "interns1": f"{_ROOM}.think:INTERNS1",
        "kimi": f"{_ROOM}.think:KIMI",
        "kimi_k2": f"{_ROOM}.think:KIMI_K2",
        "minimax": f"{_ROOM}.think:MINIMAX",
        "minimax-append-think": f"{_ROOM}.minimax_append_think:MINIMAX_APPEND_THINK",
        "nano_v3": f"{_ROOM}.think:NANO_V3",
        "qwen3": f"{_ROOM}.think:QWEN3",
        "qwen3-thinking": f"{_ROOM}.think:QWEN3_THINKING",
        "step3": f"{_ROOM}.think:STEP3",
    },
    entry_point="sapwood.reasoning_parsers",
)

_MARKS: tuple[tuple[str, str], ...] = (
    (r"<\|channel\|>", "gpt-oss"),
    (r"◁think▷", "kimi"),
    (r"tool_calls_section_begin[\s\S]*</think>|</think>[\s\S]*tool_calls_section_begin", "kimi_k2"),
    (r"<arg_key>[\s\S]*</think>|</think>[\s\S]*<arg_key>", "glm45"),
    (r"<think>|</think>", "qwen3"),
)
"""(pattern that a chat template has in it, format that it points at); the first match counts.

Several parsers share the tags <think> and </think>, and all of them see when a prompt has opened
the thinking. So "qwen3" is right for every model with these tags.
"""


def format_of_template(source: str) -> str | None:
    """Name of the format of thinking that a chat template knows; None if it knows none."""
    return next((name for mark, name in _MARKS if re.search(mark, source)), None)
