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
    CallCut,
    CallEnd,
    CallFailed,
    CallStart,
    Content,
    Event,
)
from sapwood.text.source import Malformed, Parser, Source, Steps

NAME = re.compile(r"[\w.:/\-]+")
"""Characters of a tool's name."""

MAX_REREAD = 1 << 18
"""Characters of broken calls in one answer that are read again, in search of calls inside them.

After that many, a broken call is skipped as a whole: else a text of nothing but beginnings of calls
would cost the square of its length.
"""

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
    reopens        texts that begin a call only after an opening that no call followed, or after a
                   call that was announced and failed
    strays         tags that are left out of the content where the model writes them outside calls;
                   after a call that failed they stay, since they may belong to it
    tags           every tag of the format, the openings included
    separates_reasoning  whether the format's parser emits the thinking too
    is_told_in_text  whether a text in the prompt tells the model its tools and this format, instead
                   of the chat template
    """

    name: ClassVar[str]
    openings: ClassVar[tuple[str, ...]]
    opens_answer: ClassVar[tuple[str, ...]] = ()
    reopens: ClassVar[tuple[str, ...]] = ()
    strays: ClassVar[tuple[str, ...]] = ()
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

    mark              index of the first character that is in no event yet
    has_content       whether there was content before
    has_failed        whether text that began like a call has become content
    may_reopen        whether this was after an opening tag, or after a call had been announced
    num_reread        characters of failed calls that are or will be read again
    """

    def __init__(self, tools: ToolSet, wire: ToolFormat) -> None:
        super().__init__()
        self.mark = 0
        self.has_content = False
        self.has_failed = False
        self.may_reopen = False
        self.num_reread = 0
        self._tools = tools
        self._wire = wire
        self._name = ""
        self._num_started = 0
        self._num_ended = 0
        self._num_refused = 0
        self._is_open = False
        self._is_refused = False
        self._follows_refused = False
        self._started_at = 0
        self._held = ""

    @property
    def parameters(self) -> Any:
        """The schema of the open call's arguments; {} allows anything."""
        return self._tools.parameters.get(self._name, {})

    def emit(self, event: Event) -> None:
        self.has_content = self.has_content or isinstance(event, Content)
        super().emit(event)

    @property
    def tool_schemas(self) -> Mapping[str, Any]:
        """Name of each of the request's tools -> JSON schema of its arguments."""
        return self._tools.parameters

    @property
    def only_opened(self) -> bool:
        return self._tools.only_opened

    @property
    def num_read(self) -> int:
        """How many calls have been read to their end, those of unknown tools included."""
        return self._num_ended + self._num_refused

    @property
    def open_since(self) -> int | None:
        """Where the open call was announced; None if no call is open."""
        return self._started_at if self._is_open else None

    @property
    def may_call(self) -> bool:
        return self._tools.max_calls is None or self._num_ended < self._tools.max_calls

    def start(self, name: str, call_id: str | None = None) -> None:
        """Begin a call; raises Malformed for a call beyond `max_calls`.

        A call of a tool that the request does not have is read too, since others may follow it in
        the same list, but its text becomes content.
        """
        if not self.may_call or not NAME.fullmatch(name):
            raise Malformed
        self._is_refused = name not in self._tools.parameters and not self._tools.keeps_unknown
        if self._is_refused:
            return
        self._name = name
        self._started_at = self.pos
        self._is_open = True
        call_id = call_id or self._wire.new_call_id()
        self.emit(CallStart(self._num_started, name, call_id))
        self._num_started += 1

    def arguments(self, text: str) -> None:
        """Emit more of the arguments' JSON text.

        A closing brace at the end is held until the call is complete. So the arguments of a call
        that fails never look complete to a client that streams them.
        """
        if self._is_refused:
            return
        text = self._held + text
        self._held = "}" if text.endswith("}") else ""
        shown = text.removesuffix("}")
        if shown:
            self.emit(CallArguments(self._num_started - 1, shown))

    def end_call(self) -> None:
        self._follows_refused = self._is_refused
        if self._is_refused:
            self._is_refused = False
            self._num_refused += 1
            self.has_failed = True
            self.commit()
            return
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
            self.may_reopen = True
        self._is_open, self._is_refused, self._held = False, False, ""

    def cut_call(self) -> None:
        """Emit that the text was cut off inside the open call, which reaches to its end."""
        self.pos = self.num_characters
        self.emit(CallCut(self._num_started - 1, self.slice(self.mark, self.pos)))
        self._is_open, self._held = False, ""
        self.mark = self.pos

    def begin_attempt(self) -> None:
        """From here on `commit` emits markup, until a call of an unknown tool has been read."""
        self.mark = self.pos
        self.hit_end = False
        self._follows_refused = False

    def commit(self) -> None:
        """Emit the text since the last call as markup; as content if that call became content."""
        if not self._follows_refused:
            self.markup_since(self.mark)
        elif self.mark < self.pos:
            self.emit(Content(self.slice(self.mark, self.pos)))
        self.mark = self.pos

    def leave_out(self, tag: str) -> None:
        """Emit the tag at `tag_start` as markup; the space before it stays between content."""
        if self.has_content and self.pos < self.tag_start:
            self.emit(Content(self.slice(self.pos, self.tag_start)))
            self.pos = self.tag_start
        before = self.pos
        self.pos = self.tag_start + len(tag)
        self.markup_since(before)

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
        tags = _awaited(source, wire)
        tag = yield from source.passing(Content, tags)
        if tag is None:
            return
        if tag in wire.strays:
            source.leave_out(tag)
        else:
            yield from _attempt(source, wire, tag)


def _awaited(source: CallSource, wire: ToolFormat) -> tuple[str, ...]:
    """The tags that end the content here."""
    if not source.may_call:
        return wire.openings if wire.separates_reasoning else ()
    reopens = wire.reopens if source.may_reopen and not source.only_opened else ()
    strays = () if source.has_failed else wire.strays
    return (*wire.openings, *reopens, *strays)


def _attempt(source: CallSource, wire: ToolFormat, opening: str) -> Steps[None]:
    """Read the calls after the opening at `tag_start`; if none follows, the opening is content."""
    source.begin_attempt()
    first_mark = source.mark
    source.pos = after_opening = source.tag_start + len(opening)
    num_read = source.num_read
    try:
        yield from wire.calls(source, opening)
        if source.num_read == num_read and not wire.separates_reasoning:
            raise Malformed
        after_calls = source.pos
        next_character = yield from source.space()
        if source.has_content and next_character:
            # White space between two pieces of content stays; before a call it goes nevertheless.
            source.pos = after_calls
        source.commit()
    except Malformed:
        source.may_reopen = source.may_reopen or opening in wire.openings
        _fail(source, after_opening if source.mark == first_mark else source.mark + 1)


def _fail(source: CallSource, resume: int) -> None:
    """End an attempt at a broken call.

    resume  where to go on: only the text up to there becomes content, since there may be calls in
            the text after it
    """
    open_since, failed_at = source.open_since, source.pos
    ends_inside = open_since is not None and source.hit_end
    if ends_inside and source.is_cut:
        source.cut_call()
        return
    source.fail_call()
    source.has_failed = True
    if ends_inside:
        resume = source.num_characters
    elif open_since is not None:
        # Not before: a tag between the opening and the name would announce this call once more.
        resume = max(resume, open_since)
    source.num_reread += max(0, failed_at - resume)
    if source.num_reread > MAX_REREAD:
        resume = max(resume, failed_at)
    source.pos = resume
    source.emit(Content(source.slice(source.mark, resume)))
    source.mark = resume
