"""gpt-oss's Harmony format: messages with a channel, each with a header and a body.

    <|channel|>analysis<|message|>thoughts<|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{…}<|call|>
    <|start|>assistant<|channel|>final<|message|>the answer<|return|>

Source: OpenAI's description of the response format. The engine cuts off a stop token, so the last
<|call|> or <|return|> is usually missing. `commentary` without a recipient is a preamble, which is
shown to the user; so is `final`, and a message without a channel. What the model writes in the name
of somebody else, such as the result of a tool, is shown as well: it is no call, and not thinking.
"""

from __future__ import annotations

from collections.abc import Callable

from sapwood.text.events import Content, Event, Reasoning
from sapwood.text.source import Malformed, Steps
from sapwood.text.tools.format import CallSource, CallStructure, ToolFormat
from sapwood.text.tools.json_call import json_call_of

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"

_ENDS = (END, CALL, RETURN, START, CHANNEL)
_MAX_HEADER = 256
_CHANNELS = ("analysis", "commentary", "final")
_CONSTRAINTS = ("json", "code")
_FUNCTIONS = "functions."
_FILLER = "commentary"
"""Some answers have this word alone between a call and the next message."""


class Harmony(ToolFormat):
    """The Harmony format.

    calls_tools  False: only thinking and content are separated, and calls become content
    """

    name = "gpt-oss"
    openings = (START, CHANNEL)
    strays = (MESSAGE, CONSTRAIN, END, CALL, RETURN)
    tags = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
    separates_reasoning = True

    def __init__(self, *, calls_tools: bool = True) -> None:
        self._calls_tools = calls_tools

    def calls(self, source: CallSource, opening: str) -> Steps[None]:
        """Read one message of any kind."""
        header = yield from source.until(MESSAGE, limit=_MAX_HEADER)
        message = _message(opening + header if opening == CHANNEL else header)
        if message is None:
            raise Malformed
        author, channel, recipient = message
        is_own = author in ("", "assistant")
        if is_own and recipient:
            yield from self._call(source, recipient)
            return
        kind: Callable[[str], Event] = Reasoning if is_own and channel == "analysis" else Content
        yield from self._body(source, kind)

    def _call(self, source: CallSource, recipient: str) -> Steps[None]:
        # Recipients that are not functions are tools of OpenAI's own, such as browser.search.
        if not self._calls_tools:
            raise Malformed
        name = recipient.removeprefix(_FUNCTIONS)
        after_header = source.pos
        if (yield from source.skips_after_space(CALL, END, RETURN)):
            source.pos = after_header
            source.start(name)
            source.arguments("{}")
            source.end_call()
        else:
            yield from json_call_of(source, name)
        if (yield from source.skips_after_space(CALL, END, RETURN)):
            source.commit()
            yield from self._filler(source)

    def _filler(self, source: CallSource) -> Steps[None]:
        after_call = source.pos
        if (yield from source.skips_after_space(_FILLER)):
            after_filler = source.pos
            before_tag = yield from source.skips_after_space(START, CHANNEL)
            if before_tag or not (yield from source.space()):
                source.pos = after_filler
                source.commit()
                return
        source.pos = after_call

    def _body(self, source: CallSource, kind: Callable[[str], Event]) -> Steps[None]:
        source.commit()
        source.is_thinking = kind is Reasoning
        tag = yield from source.passing(kind, _ENDS)
        source.is_thinking = False
        source.mark = source.pos
        if tag in (END, CALL, RETURN):
            source.pos = source.tag_start + len(tag)
        source.commit()

    def structure(self, name: str) -> CallStructure | None:
        begin = f"{CHANNEL}commentary to={_FUNCTIONS}{name} {CONSTRAIN}json{MESSAGE}"
        return CallStructure(trigger=f"{CHANNEL}commentary", begin=begin, end=CALL)


def _message(header: str) -> tuple[str, str, str] | None:
    """(author, channel, recipient) of a message, "" if missing; None if the header is malformed."""
    before, has_channel, after = header.partition(CHANNEL)
    first, second = _words(before), _words(after)
    if first is None or second is None:
        return None
    (author, early), (channel, late) = first, second
    if has_channel and channel.lower() not in _CHANNELS:
        return None
    return author.lower(), channel.lower(), late or early


def _words(part: str) -> tuple[str, str] | None:
    """(name, recipient) of a part of a header, such as `commentary to=functions.f`."""
    words, _, constraint = part.partition(CONSTRAIN)
    name = recipient = ""
    for word in words.split():
        text, _, to = word.partition("to=")
        if name and text not in ("", *_CONSTRAINTS):
            return None
        name, recipient = name or text, to or recipient
    if "<" in name + recipient or len(constraint.split()) > 1:
        return None
    return name, recipient
