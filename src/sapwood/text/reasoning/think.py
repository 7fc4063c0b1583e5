"""Thinking between two tags, before the answer."""

from __future__ import annotations

from sapwood.text.events import Content, Reasoning
from sapwood.text.reasoning.format import ReasoningFormat, Shown
from sapwood.text.source import Source, Steps


class Think(ReasoningFormat):
    """Thinking between two tags.

    opens, closes  the tags; only white space may come before the opening tag
    is_forced      whether the model thinks from its first token on without writing the opening tag,
                   because its template has written it
    ends_before    texts that end the thinking if the model forgets the closing tag, and belong to
                   the answer: the beginnings of a tool call
    """

    def __init__(
        self,
        opens: str = "<think>",
        closes: str = "</think>",
        *,
        is_forced: bool = False,
        ends_before: tuple[str, ...] = (),
    ) -> None:
        self.opens, self.closes = opens, closes
        self.forced_close = f"\n{closes}"
        self.tags = (opens, closes)
        self.is_forced = is_forced
        self._ends_before = ends_before

    def shown_by(self, prompt: str, *, prefix: str = "") -> Shown:
        if self.closes in prefix:
            return Shown.CLOSED
        end = prompt.rstrip()
        if end.endswith(self.closes):
            return Shown.CLOSED
        if self.opens in prefix or end.endswith(self.opens):
            return Shown.OPEN
        # A beginning without tags is thinking of a model whose template writes the tag itself,
        # and part of the answer of any other.
        if prefix.strip() and not self.is_forced:
            return Shown.CLOSED
        return Shown.NOTHING

    def parse(self, source: Source, *, is_thinking: bool) -> Steps[None]:
        yield from source.space()
        if (yield from source.skips(self.opens)):
            is_thinking = True
        if is_thinking:
            source.is_thinking = True
            yield from source.space()
            source.markup_since(0)
            yield from self._thoughts(source)
        else:
            source.pos = 0
        yield from source.passing(Content, ())

    def _thoughts(self, source: Source) -> Steps[None]:
        tag = yield from source.passing(Reasoning, (self.closes, *self._ends_before))
        source.is_thinking = False
        if tag == self.closes:
            before = source.pos
            source.pos = source.tag_start + len(tag)
            yield from source.space()
            source.markup_since(before)


DEEPSEEK_R1 = Think(is_forced=True)
DEEPSEEK_V3 = Think()
GLM45 = Think(ends_before=("<tool_call>",))
INTERNS1 = Think(ends_before=("<|action_start|>",))
KIMI = Think("◁think▷", "◁/think▷")
KIMI_K2 = Think(is_forced=True, ends_before=("<|tool_calls_section_begin|>",))
MINIMAX = Think(is_forced=True)
NANO_V3 = Think()
QWEN3 = Think()
QWEN3_THINKING = Think(is_forced=True)
STEP3 = Think(is_forced=True)
