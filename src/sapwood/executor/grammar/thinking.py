"""Free reasoning before the part of an output that a grammar constrains."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from sapwood.executor.grammar.interface import MAX_ROLLBACK, Matcher, check_rollback
from sapwood.executor.grammar.vocabulary import Vocabulary
from sapwood.schema.grammar import Thinking

_BITS = np.left_shift(np.uint32(1), np.arange(32, dtype=np.uint32)).view(np.int32)


class _Stage(Enum):
    BEGINNING = auto()
    THINKING = auto()
    ANSWER = auto()


@dataclass(frozen=True, slots=True)
class _Place:
    """How far an output has come.

    inner       follows the grammar; the answer after some reasoning gets a new one
    num_inner   tokens that `inner` has taken
    inner_fits  whether the output so far may still be an answer without reasoning
    num_opened  tokens of the reasoning's opening that the output has
    tail        the reasoning's last bytes, which may be the beginning of its end
    """

    stage: _Stage
    inner: Matcher
    num_inner: int = 0
    inner_fits: bool = True
    num_opened: int = 0
    tail: bytes = b""


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
        stage = _Stage.BEGINNING if self._begin else _Stage.ANSWER
        self._place = _Place(_Stage.THINKING if thinking.is_open else stage, new_matcher())
        # The places before each of the last tokens.
        self._history: deque[_Place] = deque(maxlen=MAX_ROLLBACK)

    @property
    def has_ended(self) -> bool:
        return self._place.stage is _Stage.ANSWER and self._place.inner.has_ended

    def fill(self, masks: NDArray[np.int32], index: int) -> None:
        place = self._place
        if place.stage is _Stage.THINKING:
            masks[index] = -1
            for end in self._vocabulary.ends:
                masks[index, end // 32] &= ~_BITS[end % 32]
            return
        if place.inner_fits:
            place.inner.fill(masks, index)
        else:
            masks[index] = 0
        if place.stage is _Stage.BEGINNING:
            opening = self._begin[place.num_opened]
            masks[index, opening // 32] |= _BITS[opening % 32]

    def accept(self, token_id: int) -> bool:
        before = self._place
        after = self._after(before, token_id)
        if after is None:
            return False
        self._history.append(before)
        self._place = after
        return True

    def rollback(self, num_tokens: int) -> None:
        check_rollback(num_tokens, len(self._history))
        for _ in range(num_tokens):
            after, self._place = self._place, self._history.pop()
            if after.inner is self._place.inner and after.num_inner > self._place.num_inner:
                after.inner.rollback(after.num_inner - self._place.num_inner)

    def _after(self, place: _Place, token_id: int) -> _Place | None:
        """The place after that token, which `place.inner` has taken if it is its; None: the token
        may not come here."""
        if place.stage is _Stage.THINKING:
            return self._think(place, token_id)
        fits = place.inner_fits and place.inner.accept(token_id)
        num_inner = place.num_inner + fits
        if place.stage is _Stage.ANSWER:
            return replace(place, num_inner=num_inner) if fits else None
        opens = token_id == self._begin[place.num_opened]
        if not opens and not fits:
            return None
        num_opened = place.num_opened + 1
        stage = _Stage.BEGINNING
        if not opens or (fits and place.inner.has_ended):
            stage = _Stage.ANSWER
        elif num_opened == len(self._begin):
            stage = _Stage.THINKING
        return replace(
            place, stage=stage, num_inner=num_inner, inner_fits=fits, num_opened=num_opened
        )

    def _think(self, place: _Place, token_id: int) -> _Place | None:
        if token_id in self._vocabulary.ends:
            return None
        text = place.tail + self._vocabulary.tokens[token_id]
        found = text.find(self._end)
        if found == -1:
            tail = text[-(len(self._end) - 1) :] if len(self._end) > 1 else b""
            return replace(place, tail=tail)
        # The old matcher may have taken tokens of the opening, so the grammar begins anew.
        inner = self._new_matcher()
        # A token may hold the end of the reasoning and the beginning of the answer.
        rest = text[found + len(self._end) :].strip().decode("utf-8", "replace")
        answer = self._vocabulary.encode(rest) if rest else []
        if not all(inner.accept(answer_id) for answer_id in answer):
            return None
        return _Place(_Stage.ANSWER, inner, num_inner=len(answer))
