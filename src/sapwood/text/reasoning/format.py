"""What a model's way of thinking says, and the parser that takes it apart from the answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum

from sapwood.text.source import Parser, Source, Steps


class Shown(Enum):
    """What the end of a prompt shows of the thinking."""

    OPEN = "open"
    CLOSED = "closed"
    NOTHING = "nothing"


class ReasoningFormat(ABC):
    """One way of marking thinking. Instances have no state.

    tags          every tag of the format
    opens         what begins the thinking
    closes        what ends it: a grammar for the answer begins after it
    forced_close  what is written for the model when its thinking must end now
    ends          what ends it where its tokens are counted; as closes, if not something shorter
    is_forced     where the prompt shows nothing, the answer begins with thinking even without a tag
    tool_format   the format of calls of tools that takes the thinking apart itself, if one does
    """

    tags: tuple[str, ...]
    opens: str
    closes: str
    forced_close: str
    is_forced: bool = False
    tool_format: str | None = None

    @property
    def ends(self) -> str:
        return self.closes

    @abstractmethod
    def shown_by(self, prompt: str, *, prefix: str = "") -> Shown:
        """Whether the thinking has been opened or closed where the answer begins.

        prompt  the whole of it
        prefix  what of it is the beginning of the answer, which the model goes on with
        """

    @abstractmethod
    def parse(self, source: Source, *, is_thinking: bool) -> Steps[None]:
        """Emit Reasoning and Content until the text ends."""


def reasoning_parser(form: ReasoningFormat, *, is_thinking: bool) -> Parser:
    """Takes the thinking in one answer apart from the rest.

    is_thinking  whether the answer begins inside the thinking
    """
    source = Source()
    source.is_thinking = is_thinking
    return Parser(source, form.parse(source, is_thinking=is_thinking))
