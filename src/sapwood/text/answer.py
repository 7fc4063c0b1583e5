"""Takes an answer apart: first the thinking, then content and tool calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sapwood.text.events import Answer, Content, Event, Reasoning, merged
from sapwood.text.reasoning.format import ReasoningFormat, reasoning_parser
from sapwood.text.source import Parser
from sapwood.text.tools.format import ToolFormat, ToolSet, tool_parser
from sapwood.text.tools.harmony import Harmony


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerShape:
    """Which formats the answers to one request are written in.

    reasoning    format of the thinking; None: thinking stays in the content as the model wrote it
    is_thinking  whether the answer begins inside the thinking
    calls        format of tool calls; None: calls stay in the content as the model wrote them
    tools        the tools that the answer may call
    """

    reasoning: ReasoningFormat | None = None
    is_thinking: bool = False
    calls: ToolFormat | None = None
    tools: ToolSet = field(default_factory=ToolSet)

    @property
    def tags(self) -> frozenset[str]:
        """Tags that must be in the text, even if the tokenizer calls them special."""
        reasoning = self.reasoning.tags if self.reasoning is not None else ()
        calls = self.calls.tags if self.calls is not None else ()
        return frozenset((*reasoning, *calls))

    def parser(self) -> AnswerParser:
        """A new parser for one answer."""
        return AnswerParser(self)

    def parsed(self, text: str, *, is_cut: bool = False) -> Answer:
        parser = self.parser()
        return Answer.of([*parser.feed(text), *parser.finish(is_cut=is_cut)])


class AnswerParser:
    """Parses one answer while it arrives: `feed` it the text in any parts, then `finish`."""

    def __init__(self, shape: AnswerShape) -> None:
        self._thinking: Parser | None = None
        self._calls: Parser | None = None
        self._keeps_reasoning = True
        reasoning, calls = shape.reasoning, shape.calls
        if calls is not None:
            self._calls = tool_parser(calls, shape.tools)
        if calls is not None and calls.separates_reasoning:
            self._keeps_reasoning = reasoning is not None
        elif reasoning is not None and reasoning.tool_format is not None:
            self._thinking = tool_parser(Harmony(calls_tools=False), ToolSet())
        elif reasoning is not None:
            self._thinking = reasoning_parser(reasoning, is_thinking=shape.is_thinking)

    @property
    def is_thinking(self) -> bool:
        stages = (self._thinking, self._calls)
        return any(stage.is_thinking for stage in stages if stage is not None)

    def feed(self, text: str) -> list[Event]:
        if self._thinking is None:
            return self._later([Content(text)] if text else [])
        return self._later(self._thinking.feed(text))

    def finish(self, *, is_cut: bool = False) -> list[Event]:
        """The text has ended. Returns the events of the text that was held back.

        is_cut  whether the text was cut off; see `Parser.finish`
        """
        events = self._later([] if self._thinking is None else self._thinking.finish())
        if self._calls is not None:
            events += self._shown(self._calls.finish(is_cut=is_cut))
        return merged(events)

    def _later(self, events: Iterable[Event]) -> list[Event]:
        """The events of the first stage, with its content parsed by the second stage."""
        if self._calls is None:
            return list(events)
        out: list[Event] = []
        for event in events:
            if isinstance(event, Content):
                out += self._shown(self._calls.feed(event.text))
            else:
                out.append(event)
        return merged(out)

    def _shown(self, events: list[Event]) -> list[Event]:
        if self._keeps_reasoning:
            return events
        return [Content(each.text) if isinstance(each, Reasoning) else each for each in events]
