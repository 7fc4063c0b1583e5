"""What a wire format of tool calls must define, and the one parser that drives all formats."""

from __future__ import annotations

import re
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sapwood.text.events import (
    CallArguments,
    CallEnd,
    CallFailed,
    CallStart,
    Content,
    Event,
)
from sapwood.text.source import Malformed, Parser, Source, Steps

NAME = re.compile(r"[\w.:/\-]+")
"""Characters of a tool's name."""

_ID_ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSet:
    """The tools of one request.

    parameters     name of each tool -> JSON schema of its arguments
    keeps_unknown  whether a call of any other tool is a call too; else it becomes content
    max_calls      number of calls after which further calls become content; None: no limit
    only_opened    whether only an opening begins a call, and not the text that may begin an answer:
                   a grammar that holds calls to their schemas starts at the opening
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    keeps_unknown: bool = False
    max_calls: int | None = None
    only_opened: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CallStructure:
    """The text around the JSON arguments of one tool's calls, for grammars.

    trigger  text with which the calls of every tool begin
    begin    text before the arguments, from the trigger on
    end      text after the arguments
    """

    trigger: str
    begin: str
    end: str


class ToolFormat(ABC):
    """One wire format. Instances have no state.

    openings       tags that begin one or more calls, wherever they stand
    opens_answer   texts that begin a call only at the beginning of an answer
    tags           every tag of the format, the openings included
    separates_reasoning  whether the format's parser emits the thinking too
    is_told_in_text  whether a text in the prompt tells the model its tools and this format, instead
                   of the chat template
    """

    name: ClassVar[str]
    openings: ClassVar[tuple[str, ...]]
    opens_answer: ClassVar[tuple[str, ...]] = ()
    tags: ClassVar[tuple[str, ...]]
    separates_reasoning: ClassVar[bool] = False
    is_told_in_text: ClassVar[bool] = False

    @abstractmethod
    def calls(self, source: CallSource, opening: str) -> Steps[None]:
        """Read one or more calls, whose opening has been read already.

        Raises Malformed where the text breaks the format; then all text after the last complete
        call becomes content. Returns at a place where content may follow.
        """

    def structure(self, name: str) -> CallStructure | None:
        """The text around the arguments of the tool's calls; None if arguments are not JSON."""
        return None

    def new_call_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"


def short_call_id() -> str:
    """Nine letters and digits, which templates of Mistral's models insist on."""
    return "".join(secrets.choice(_ID_ALPHABET) for _ in range(9))


class CallSource(Source):
    """A text with tool calls in it.

    mark         index of the first character that is in no event yet
    has_content  whether there was content before
    """

    def __init__(self, tools: ToolSet, wire: ToolFormat) -> None:
        super().__init__()
        self.mark = 0
        self.has_content = False
        self._tools = tools
        self._wire = wire
        self._name = ""
        self._num_started = 0
        self._num_ended = 0
        self._is_open = False
        self._held = ""

    @property
    def parameters(self) -> Any:
        """The schema of the open call's arguments; {} allows anything."""
        return self._tools.parameters.get(self._name, {})

    def emit(self, event: Event) -> None:
        self.has_content = self.has_content or isinstance(event, Content)
        super().emit(event)

    @property
    def num_ended(self) -> int:
        return self._num_ended

    @property
    def may_call(self) -> bool:
        return self._tools.max_calls is None or self._num_ended < self._tools.max_calls

    def start(self, name: str, call_id: str | None = None) -> None:
        """Begin a call; raises Malformed for an unknown tool and for a call beyond `max_calls`."""
        is_known = name in self._tools.parameters or self._tools.keeps_unknown
        if not self.may_call or not is_known or not NAME.fullmatch(name):
            raise Malformed
        self._name = name
        self._is_open = True
        call_id = call_id or self._wire.new_call_id()
        self.emit(CallStart(self._num_started, name, call_id))
        self._num_started += 1

    def arguments(self, text: str) -> None:
        """Emit more of the arguments' JSON text.

        A closing brace at the end is held until the call is complete. So the arguments of a call
        that fails never look complete to a client that streams them.
        """
        text = self._held + text
        self._held = "}" if text.endswith("}") else ""
        shown = text.removesuffix("}")
        if shown:
            self.emit(CallArguments(self._num_started - 1, shown))

    def end_call(self) -> None:
        index = self._num_started - 1
        self.emit(CallArguments(index, self._held))
        self.emit(CallEnd(index, self.slice(self.mark, self.pos)))
        self._is_open, self._held = False, ""
        self._num_ended += 1
        self.mark = self.pos

    def fail_call(self) -> None:
        """Emit that the open call has failed, if there is one."""
        if self._is_open:
            self.emit(CallFailed(self._num_started - 1))
        self._is_open, self._held = False, ""

    def commit(self) -> None:
        """Emit the text since the last call as markup."""
        self.markup_since(self.mark)
        self.mark = self.pos

    def close(self, *tags: str) -> Steps[None]:
        """Read the tags that follow, in this order; any may be missing after a complete call."""
        for tag in tags:
            yield from self.skips_after_space(tag)
        self.commit()

    def tool_name(self) -> Steps[str]:
        name = yield from self.while_matching(NAME, limit=256)
        if not name:
            raise Malformed
        return name


def tool_parser(wire: ToolFormat, tools: ToolSet) -> Parser:
    """Finds the calls in one answer."""
    source = CallSource(tools, wire)
    opens_answer = () if tools.only_opened else wire.opens_answer
    return Parser(source, _calls_and_content(source, wire, opens_answer))


def _calls_and_content(
    source: CallSource, wire: ToolFormat, opens_answer: Sequence[str]
) -> Steps[None]:
    if opens_answer:
        opening = yield from source.skips_after_space(*opens_answer)
        if opening is not None:
            source.tag_start = source.pos - len(opening)
            source.pos = 0
            yield from _attempt(source, wire, opening)
    while True:
        may_open = source.may_call or wire.separates_reasoning
        openings = wire.openings if may_open else ()
        opening = yield from source.passing(Content, openings)
        if opening is None:
            return
        yield from _attempt(source, wire, opening)


def _attempt(source: CallSource, wire: ToolFormat, opening: str) -> Steps[None]:
    """Read the calls after the opening at `tag_start`; if none follows, the opening is content."""
    first_mark = source.mark = source.pos
    source.pos = after_opening = source.tag_start + len(opening)
    num_ended = source.num_ended
    try:
        yield from wire.calls(source, opening)
        if source.num_ended == num_ended and not wire.separates_reasoning:
            raise Malformed
        after_calls = source.pos
        next_character = yield from source.space()
        if source.has_content and next_character:
            # White space between two pieces of content stays; before a call it goes nevertheless.
            source.pos = after_calls
        source.commit()
    except Malformed:
        source.fail_call()
        # Only the opening becomes content: there may be calls in the text after it.
        resume = after_opening if source.mark == first_mark else source.mark + 1
        source.pos = resume
        source.emit(Content(source.slice(source.mark, resume)))
        source.mark = resume
