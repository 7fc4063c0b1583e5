"""A limit on the thinking before an answer, in tokens."""

from __future__ import annotations

import msgspec

from sapwood.base.errors import InvalidRequest


class ThinkingBudget(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """After `max_tokens` tokens of thinking, the end of the thinking is written for the model.

    max_tokens  counted from the first token after `begin`, or from the first output token if the
                prompt has opened the thinking
    begin       token ids that open the thinking
    end         token ids that close the thinking
    forced      token ids that are put out when the budget is used up; `end` is among them
    is_open     whether the prompt has opened the thinking already
    """

    max_tokens: int
    begin: tuple[int, ...]
    end: tuple[int, ...]
    forced: tuple[int, ...]
    is_open: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise InvalidRequest(
                f"the thinking budget is {self.max_tokens} but must be >= 0 tokens",
                param="thinking_budget",
            )
        if not (self.begin and self.end and self.forced):
            raise InvalidRequest("a thinking budget needs the tokens that open and close it")
