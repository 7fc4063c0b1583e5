"""The formats in which the served model writes its thinking and its tool calls."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.schema.config.decision import Decision
from sapwood.text.reasoning.format import ReasoningFormat
from sapwood.text.reasoning.registry import REASONING_FORMATS
from sapwood.text.reasoning.registry import format_of_template as reasoning_of_template
from sapwood.text.template import ChatTemplate
from sapwood.text.tools.format import ToolFormat
from sapwood.text.tools.generic import Generic
from sapwood.text.tools.registry import TOOL_FORMATS
from sapwood.text.tools.registry import format_of_template as calls_of_template

AUTO = "auto"
NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormats:
    """The formats of one model's answers.

    reasoning      format of the thinking; None: thinking stays in the content
    calls          format of tool calls; None: calls stay in the content
    keeps_unknown  whether a call of a tool that the request does not have is a call too
    decisions      what "auto" became, and why
    """

    reasoning: ReasoningFormat | None = None
    calls: ToolFormat | None = None
    keeps_unknown: bool = False
    decisions: tuple[Decision, ...] = ()

    @property
    def tells_tools_in_text(self) -> bool:
        """A text in the prompt tells the model its tools; else the chat template does."""
        return self.calls is not None and self.calls.is_told_in_text

    @staticmethod
    def of_model(
        *,
        tool_call_parser: str,
        reasoning_parser: str,
        template: ChatTemplate | None,
        architectures: tuple[str, ...] = (),
        keeps_unknown: bool = False,
    ) -> AnswerFormats:
        """The formats of the named parsers; "auto" stands for what the chat template points at.

        template  None: there are no chats, and "auto" is "none"
        Raises    ConfigError for a name that is not known
        """
        chosen = {"tool_call_parser": tool_call_parser, "reasoning_parser": reasoning_parser}
        decisions: list[Decision] = []
        if template is not None:
            if tool_call_parser == AUTO:
                decisions.append(_calls_of_model(template, architectures))
            if reasoning_parser == AUTO:
                decisions.append(_reasoning_of_model(template))
        chosen |= {decision.option: str(decision.value) for decision in decisions}
        calls, reasoning = chosen["tool_call_parser"], chosen["reasoning_parser"]
        return AnswerFormats(
            reasoning=None if reasoning in (NONE, AUTO) else REASONING_FORMATS.get(reasoning),
            calls=None if calls in (NONE, AUTO) else TOOL_FORMATS.get(calls)(),
            keeps_unknown=keeps_unknown,
            decisions=tuple(decisions),
        )


def _calls_of_model(template: ChatTemplate, architectures: tuple[str, ...]) -> Decision:
    option = "tool_call_parser"
    if not template.places.tools:
        return Decision(option, Generic.name, "the chat template has no place for tools")
    found = calls_of_template(template.source)
    if found is None:
        why = "the chat template shows calls in no format that is known here"
        return Decision(option, Generic.name, why)
    # MiMo's template has the tags of Qwen3-Coder's, whose machine reads both.
    is_mimo = any(name.startswith("MiMo") for name in architectures)
    name = "mimo" if found == "qwen3_coder" and is_mimo else found
    return Decision(option, name, "the chat template shows calls in this format")


def _reasoning_of_model(template: ChatTemplate) -> Decision:
    found = reasoning_of_template(template.source)
    if found is None:
        return Decision("reasoning_parser", NONE, "the chat template shows no thinking")
    return Decision("reasoning_parser", found, "the chat template shows thinking in this format")
