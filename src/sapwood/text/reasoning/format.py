"""What a format of thinking must define, and the parser that separates thinking from the answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum

from sapwood.text.source import Parser, Source, Steps


class Shown(Enum):
    """What the end of a prompt shows about the thinking: opened, closed, or neither."""

    OPEN = "open"
    CLOSED = "closed"
    NOTHING = "nothing"


class ReasoningFormat(ABC):
    """One way of marking thinking. Instances have no state.

    tags          every tag of the format
    opens         the text that begins the thinking
    closes        the text that ends the thinking; a grammar for the answer begins after this text
    forced_close  the text that the server writes to end the thinking when its budget is used up
    ends          the text at which the server stops counting tokens of thinking; usually `closes`,
                  but a beginning of it is enough
    is_forced     whether an answer begins with thinking even without a tag, if the prompt shows
                  neither an opened nor a closed thinking
    tool_format   name of the tool-call format that separates the thinking itself; None: none does
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
        """Whether the thinking is opened or closed at the place where the model goes on.

        prompt  the whole prompt
        prefix  the end of the prompt that is the beginning of the answer already
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
