"""MiniMax M2 for clients that want the thinking in the content, as the model must see it later."""

from __future__ import annotations

from sapwood.text.events import Content
from sapwood.text.reasoning.think import Think
from sapwood.text.source import Source, Steps


class AppendThink(Think):
    """Leaves the thinking in the content, and puts the template's opening tag before it."""

    def parse(self, source: Source, *, is_thinking: bool) -> Steps[None]:
        source.is_thinking = False
        yield from source.space()
        if is_thinking and not (yield from source.skips(self.opens)):
            source.emit(Content(self.opens))
        source.pos = 0
        yield from source.passing(Content, ())


MINIMAX_APPEND_THINK = AppendThink(is_forced=True)
