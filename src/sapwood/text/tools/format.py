"""What a wire format says, and the one parser that drives all of them."""

from __future__ import annotations

import re
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sapwood.text.events import (
    CallArguments,
    CallEnd,
    CallFailed,
    CallStart,
    Content,
    Event,
    merged,
)
from sapwood.text.source import Malformed, Source, Steps, run

NAME = re.compile(r"[\w.:/\-]+")
"""Characters of a tool's name."""

_ID_ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSet:
    """The tools of one request.

    parameters     name -> JSON schema of its arguments
    keeps_unknown  a call of another tool is a call too; else it comes back as content
    max_calls      calls beyond these come back as content; None: any number
    only_opened    only what an opening begins is a call, not what begins the answer: a grammar
                   that holds calls to their schemas starts at the opening
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    keeps_unknown: bool = False
    max_calls: int | None = None
    only_opened: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CallStructure:
    """How a call is spelled around its JSON arguments, for grammars.

    trigger  what begins every call; begin: what stands before the arguments of this tool
    """

    trigger: str
    begin: str
    end: str


class ToolFormat(ABC):
    """One wire format. Instances have no state.

    openings       tags that begin one or more calls, wherever they stand
    opens_answer   what begins a call only where it begins the answer
    tags           every tag of the format, the openings included
    is_told_in_text  a text in the prompt tells the model its tools and this format, instead of the
                   chat template
    """

    name: ClassVar[str]
    openings: ClassVar[tuple[str, ...]]
    opens_answer: ClassVar[tuple[str, ...]] = ()
    tags: ClassVar[tuple[str, ...]]
    separates_reasoning: ClassVar[bool] = False
    is_told_in_text: ClassVar[bool] = False

    @abstractmethod
    def calls(self, source: CallSource, opening: str) -> Steps[None]:
        """Read one or more calls, whose opening has been read.

        What cannot be right raises Malformed: then what the last complete call has not taken comes
        back as content. Returns where content may follow.
        """

    def structure(self, name: str) -> CallStructure | None:
        """How a call of that tool is spelled; None where arguments are not JSON."""
        return None

    def new_call_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"


def short_call_id() -> str:
    """Nine letters and digits, which templates of Mistral's models insist on."""
    return "".join(secrets.choice(_ID_ALPHABET) for _ in range(9))


class CallSource(Source):
    """A text with calls in it.

    mark         the first character that no event accounts for yet
    has_content  there was some before
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
        """The schema of the arguments of the call that has been started; {}: anything."""
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
        """Begin a call; Malformed if the tool is not known, or if this is one call too many."""
        is_known = name in self._tools.parameters or self._tools.keeps_unknown
        if not self.may_call or not is_known or not NAME.fullmatch(name):
            raise Malformed
        self._name = name
        self._is_open = True
        call_id = call_id or self._wire.new_call_id()
        self.emit(CallStart(self._num_started, name, call_id))
        self._num_started += 1

    def arguments(self, text: str) -> None:
        """More of the arguments' JSON text.

        A brace at its end stays here until the call is complete, so that nobody who saw a call that
        failed can take it for a whole one.
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
        """The call that is open, if one is, has failed."""
        if self._is_open:
            self.emit(CallFailed(self._num_started - 1))
        self._is_open, self._held = False, ""

    def commit(self) -> None:
        """What was read since the last call is markup."""
        self.markup_since(self.mark)
        self.mark = self.pos

    def close(self, *tags: str) -> Steps[None]:
        """Read those of the tags that follow, in this order: a complete call needs none of them."""
        for tag in tags:
            yield from self.skips_after_space(tag)
        self.commit()

    def tool_name(self) -> Steps[str]:
        name = yield from self.while_matching(NAME, limit=256)
        if not name:
            raise Malformed
        return name


class ToolParser:
    """Finds the calls in one answer. `feed` it the text in any parts, then `finish`."""

    def __init__(self, wire: ToolFormat, tools: ToolSet) -> None:
        self._wire = wire
        self._opens_answer = () if tools.only_opened else wire.opens_answer
        self._source = CallSource(tools, wire)
        self._steps = self._parse()

    @property
    def is_thinking(self) -> bool:
        return self._source.is_thinking

    def feed(self, text: str) -> list[Event]:
        self._source.add(text)
        return self._advance()

    def finish(self) -> list[Event]:
        """The text has ended; what was held comes now."""
        self._source.end()
        return self._advance()

    def _advance(self) -> list[Event]:
        run(self._source, self._steps)
        events, self._source.events = self._source.events, []
        return merged(events)

    def _parse(self) -> Steps[None]:
        source, wire = self._source, self._wire
        if self._opens_answer:
            opening = yield from source.skips_after_space(*self._opens_answer)
            if opening is not None:
                source.tag_start = source.pos - len(opening)
                source.pos = 0
                yield from self._attempt(opening)
        while True:
            may_open = source.may_call or wire.separates_reasoning
            openings = wire.openings if may_open else ()
            opening = yield from source.passing(Content, openings)
            if opening is None:
                return
            yield from self._attempt(opening)

    def _attempt(self, opening: str) -> Steps[None]:
        """The opening at `tag_start` may begin calls; if none comes of it, it is content."""
        source = self._source
        first_mark = source.mark = source.pos
        source.pos = after_opening = source.tag_start + len(opening)
        num_ended = source.num_ended
        try:
            yield from self._wire.calls(source, opening)
            if source.num_ended == num_ended and not self._wire.separates_reasoning:
                raise Malformed
            after_calls = source.pos
            next_one = yield from source.space()
            if source.has_content and next_one:
                # White space between two pieces of content; before a call it goes all the same.
                source.pos = after_calls
            source.commit()
        except Malformed:
            source.fail_call()
            # Only the opening is taken for content: what follows it may hold calls of its own.
            resume = after_opening if source.mark == first_mark else source.mark + 1
            source.pos = resume
            source.emit(Content(source.slice(source.mark, resume)))
            source.mark = resume
