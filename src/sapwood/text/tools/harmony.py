"""gpt-oss's Harmony format: messages with a channel, each with a header and a body.

    <|channel|>analysis<|message|>thoughts<|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{…}<|call|>
    <|start|>assistant<|channel|>final<|message|>the answer<|return|>

Source: OpenAI's description of the response format. The engine cuts off a stop token, so the last
<|call|> or <|return|> is usually missing. `commentary` without a recipient is a preamble, which is
shown to the user; so is `final`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from sapwood.text.events import Content, Event, Reasoning
from sapwood.text.source import Malformed, Steps
from sapwood.text.tools.format import CallSource, CallStructure, ToolFormat
from sapwood.text.tools.json_call import json_call_of

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"

_ENDS = (END, CALL, RETURN, START, CHANNEL)
_MAX_HEADER = 256
_HEADER = re.compile(
    r"\s*(?:assistant)?\s*(?:to=(?P<early>\S+?))?\s*"
    r"<\|channel\|>\s*(?P<channel>analysis|commentary|final)\s*(?:to=(?P<late>[^\s<]+))?\s*"
    r"(?:<\|constrain\|>\s*\w*\s*|json\s*|code\s*)?"
)
_FUNCTIONS = "functions."


class Harmony(ToolFormat):
    """The Harmony format.

    calls_tools  False: only thinking and content are separated, and calls become content
    """

    name = "gpt-oss"
    openings = (START, CHANNEL)
    tags = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
    separates_reasoning = True

    def __init__(self, *, calls_tools: bool = True) -> None:
        self._calls_tools = calls_tools

    def calls(self, source: CallSource, opening: str) -> Steps[None]:
        """Read one message of any kind."""
        header = yield from source.until(MESSAGE, limit=_MAX_HEADER)
        match = _HEADER.fullmatch(opening + header if opening == CHANNEL else header)
        if match is None:
            raise Malformed
        recipient = match["late"] or match["early"]
        if recipient is None:
            kind: Callable[[str], Event] = Reasoning if match["channel"] == "analysis" else Content
            yield from self._body(source, kind)
        else:
            yield from self._call(source, recipient)

    def _call(self, source: CallSource, recipient: str) -> Steps[None]:
        # Recipients that are not functions are tools of OpenAI's own, such as browser.search.
        if not self._calls_tools:
            raise Malformed
        yield from json_call_of(source, recipient.removeprefix(_FUNCTIONS))
        if not (yield from source.skips_after_space(CALL, END, RETURN)):
            return
        source.commit()

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
