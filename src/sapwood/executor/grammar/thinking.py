"""Free reasoning before the part of an output that a grammar constrains."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from sapwood.executor.grammar.interface import Matcher
from sapwood.executor.grammar.vocabulary import Vocabulary
from sapwood.schema.grammar import Thinking

_BITS = np.left_shift(np.uint32(1), np.arange(32, dtype=np.uint32)).view(np.int32)


class _Stage(Enum):
    BEGINNING = auto()
    THINKING = auto()
    ANSWER = auto()


class AfterThinking:
    """A matcher that allows every token but the end of the output until the reasoning has ended,
    and from then on follows the grammar.

    A model that may think but does not is held to the grammar from its first token on: at first
    both the grammar and the opening of the reasoning are allowed, until it is clear which it is.
    """

    def __init__(
        self, thinking: Thinking, new_matcher: Callable[[], Matcher], vocabulary: Vocabulary
    ) -> None:
        self._vocabulary = vocabulary
        self._new_matcher = new_matcher
        self._begin = vocabulary.encode(thinking.begin) if thinking.begin else []
        self._end = thinking.end.encode()
        self._inner = new_matcher()
        self._inner_fits = True
        self._num_opened = 0
        self._tail = b""
        self._stage = _Stage.BEGINNING if self._begin else _Stage.ANSWER
        if thinking.is_open:
            self._stage = _Stage.THINKING

    @property
    def has_ended(self) -> bool:
        return self._stage is _Stage.ANSWER and self._inner.has_ended

    def fill(self, masks: NDArray[np.int32], index: int) -> None:
        if self._stage is _Stage.THINKING:
            masks[index] = -1
            for end in self._vocabulary.ends:
                masks[index, end // 32] &= ~_BITS[end % 32]
            return
        if self._inner_fits:
            self._inner.fill(masks, index)
        else:
            masks[index] = 0
        if self._stage is _Stage.BEGINNING:
            opening = self._begin[self._num_opened]
            masks[index, opening // 32] |= _BITS[opening % 32]

    def accept(self, token_id: int) -> bool:
        if self._stage is _Stage.ANSWER:
            return self._inner.accept(token_id)
        if self._stage is _Stage.THINKING:
            return self._think(token_id)
        opens = token_id == self._begin[self._num_opened]
        fits = self._inner_fits and self._inner.accept(token_id)
        if not opens and not fits:
            return False
        self._inner_fits = fits
        self._num_opened += 1
        if not opens or (fits and self._inner.has_ended):
            self._stage = _Stage.ANSWER
        elif self._num_opened == len(self._begin):
            self._stage = _Stage.THINKING
        return True

    @property
    def can_roll_back(self) -> bool:
        return self._stage is _Stage.ANSWER

    def rollback(self, num_tokens: int) -> None:
        self._inner.rollback(num_tokens)

    def _think(self, token_id: int) -> bool:
        if token_id in self._vocabulary.ends:
            return False
        text = self._tail + self._vocabulary.tokens[token_id]
        place = text.find(self._end)
        if place == -1:
            self._tail = text[-(len(self._end) - 1) :] if len(self._end) > 1 else b""
            return True
        self._stage = _Stage.ANSWER
        # The old matcher may have taken tokens of the opening, so the grammar begins anew.
        self._inner, self._inner_fits = self._new_matcher(), True
        # A token may hold the end of the reasoning and the beginning of the answer.
        rest = text[place + len(self._end) :].strip().decode("utf-8", "replace")
        return not rest or all(
            self._inner.accept(answer_id) for answer_id in self._vocabulary.encode(rest)
        )
