"""Events: the parts of a model's answer, in the order in which the model wrote them.

A parser turns an answer's text into events. Wherever the text is split, the joined texts of each
kind of event are the same; and the `source` of all events together is the answer's text, to the
last character, so that nothing is ever lost. A call that turns out to be broken ends with
`CallFailed`, and its text follows as content; a call that the token limit cuts off ends with
`CallCut`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import groupby


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer."""

    text: str

    @property
    def source(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the thinking before the answer."""

    text: str

    @property
    def source(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Markup:
    """Tags between the parts, and the space around them. No client sees these."""

    text: str

    @property
    def source(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins.

    index  number of the call within the answer; failed calls are counted too
    """

    index: int
    name: str
    call_id: str

    @property
    def source(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str

    @property
    def source(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A tool call is complete: its arguments are a JSON object.

    source  the call's text as the model wrote it
    """

    index: int
    source: str


@dataclass(frozen=True, slots=True)
class CallFailed:
    """The text was no tool call after all; the arguments so far are never a whole JSON object."""

    index: int

    @property
    def source(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class CallCut:
    """The answer was cut off inside a call: the arguments so far are all there are.

    source  the call's text as far as the model wrote it
    """

    index: int
    source: str


Event = Content | Reasoning | Markup | CallStart | CallArguments | CallEnd | CallFailed | CallCut


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call; `arguments` is the JSON text of an object, or its beginning if `is_cut`."""

    call_id: str
    name: str
    arguments: str
    is_cut: bool = False


@dataclass(slots=True)
class Answer:
    """An answer, put together from its events. Only the last of its calls can be cut off."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    @staticmethod
    def of(events: Iterable[Event]) -> Answer:
        answer = AnswerBuilder()
        for event in events:
            answer.add(event)
        return answer.built()


class AnswerBuilder:
    """Collects the events of an answer; calls that failed or never ended are left out."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._started: dict[int, CallStart] = {}
        self._arguments: dict[int, list[str]] = {}
        self._calls: list[ToolCall] = []
        self._cut: list[ToolCall] = []

    def add(self, event: Event) -> None:
        match event:
            case Content(text):
                self._content.append(text)
            case Reasoning(text):
                self._reasoning.append(text)
            case CallStart(index):
                self._started[index], self._arguments[index] = event, []
            case CallArguments(index, text):
                self._arguments[index].append(text)
            case CallEnd(index):
                self._calls.append(self._call(index))
            case CallCut(index):
                self._cut.append(replace(self._call(index), is_cut=True))
            case _:
                pass

    @property
    def num_calls(self) -> int:
        """Number of complete calls so far."""
        return len(self._calls)

    def built(self) -> Answer:
        calls = [*self._calls, *self._cut]
        return Answer("".join(self._content), "".join(self._reasoning), calls)

    def _call(self, index: int) -> ToolCall:
        start = self._started[index]
        return ToolCall(start.call_id, start.name, "".join(self._arguments[index]))


def merged(events: Iterable[Event]) -> list[Event]:
    """The same events, but neighbours of one kind joined to one event."""
    out: list[Event] = []
    for _, run in groupby(events, key=_kind):
        first, *others = run
        if others and isinstance(first, Content | Reasoning | Markup | CallArguments):
            # Joined once: joining each to what was joined before costs the square of their number.
            text = "".join(each.text for each in (first, *others))  # type: ignore[union-attr]
            first = replace(first, text=text)
        out.append(first)
    return out


def _kind(event: Event) -> object:
    """A key that is equal for two events if they may be joined."""
    match event:
        case Content() | Reasoning() | Markup():
            return type(event)
        case CallArguments(index):
            return index
        case _:
            return object()
