"""The formats in which the served model writes its thinking and its tool calls."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.text.reasoning.format import ReasoningFormat
from sapwood.text.reasoning.registry import REASONING_FORMATS
from sapwood.text.reasoning.registry import format_of_template as reasoning_of_template
from sapwood.text.tools.format import ToolFormat
from sapwood.text.tools.registry import TOOL_FORMATS
from sapwood.text.tools.registry import format_of_template as calls_of_template

AUTO = "auto"
NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormats:
    """The formats of one model's answers.

    reasoning      format of the thinking; None: thinking stays in the content
    calls          format of tool calls; None: there is none, and calls stay in the content
    leaves_calls   whether the operator wants calls left in the content
    keeps_unknown  whether a call of a tool that the request does not have is a call too
    """

    reasoning: ReasoningFormat | None = None
    calls: ToolFormat | None = None
    leaves_calls: bool = False
    keeps_unknown: bool = False

    @staticmethod
    def of_model(
        *,
        tool_call_parser: str,
        reasoning_parser: str,
        template: str | None,
        architectures: tuple[str, ...] = (),
        keeps_unknown: bool = False,
    ) -> AnswerFormats:
        """The formats of the named parsers; "auto" stands for what the chat template points at.

        Raises ConfigError for a name that is not known.
        """
        calls, reasoning = tool_call_parser, reasoning_parser
        if calls == AUTO:
            calls = _calls_of_model(template or "", architectures)
        if reasoning == AUTO:
            reasoning = reasoning_of_template(template or "") or NONE
        return AnswerFormats(
            reasoning=None if reasoning == NONE else REASONING_FORMATS.get(reasoning),
            calls=None if calls == NONE else TOOL_FORMATS.get(calls)(),
            leaves_calls=tool_call_parser == NONE,
            keeps_unknown=keeps_unknown,
        )


def _calls_of_model(template: str, architectures: tuple[str, ...]) -> str:
    found = calls_of_template(template) or NONE
    # MiMo's template has the same tags as Qwen3-Coder's, so the architecture decides.
    is_mimo = any(name.startswith("MiMo") for name in architectures)
    return "mimo" if found == "qwen3_coder" and is_mimo else found
