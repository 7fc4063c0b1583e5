"""Masks of tokens that are only guessed: a guess that the grammar forbids would never be right."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import takewhile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood.executor.grammar.interface import MAX_ROLLBACK, SLOW_STEP_S, GrammarFailed
from sapwood.executor.grammar.masks import GrammarMasks
from sapwood.kernels.interface import Kernels


class GrammarsAhead:
    """Holds a draft model's guesses to the grammars of their rows.

    The matchers take guesses for a while, and take them back in the end. Where a matcher cannot
    follow, or takes long, the row's guesses go on without a grammar; a step will find them wrong.

    clock_s  as in GrammarMasks
    """

    def __init__(
        self,
        grammars: GrammarMasks,
        kernels: Kernels,
        *,
        clock_s: Callable[[], float] = time.thread_time,
    ) -> None:
        self._grammars = grammars
        self._kernels = kernels
        self._clock_s = clock_s
        # By row, while it is guessed: the guesses that its matcher has taken.
        self._taken: dict[int, list[int]] = {}

    def begin(self, rows: Sequence[int]) -> None:
        """Guesses for these rows follow; all tokens before are accepted."""
        assert not self._taken, "the guesses before were taken back"
        self._taken = {row: [] for row in rows if self._grammars.matcher(row) is not None}

    def apply(
        self, logits: Tensor, rows: Sequence[int], ways: Sequence[Sequence[int]] | None = None
    ) -> set[int]:
        """Forbid in logits [S, vocab], in place, what the grammar of rows[i] does not allow.

        ways     the guesses after which that is, where guesses are trees; None: those taken
        Returns  the entries whose output has ended there, so that nothing follows"""
        at: list[int] = []
        masks: list[NDArray[np.int32]] = []
        ended = set[int]()
        for index, row in enumerate(rows):
            if ways is not None and row in self._taken and self._go(row, ways[index]):
                ended.add(index)
            mask = self._mask(row)
            if mask is not None:
                at.append(index)
                masks.append(mask)
        if at:
            self._kernels.mask_logits(logits, torch.from_numpy(np.stack(masks)), at)
        return ended

    def take(self, rows: Sequence[int], token_ids: Sequence[int]) -> set[int]:
        """These tokens are guessed. Returns the rows whose output ends with them."""
        return {
            row for row, token_id in zip(rows, token_ids, strict=True) if self._take(row, token_id)
        }

    def end(self) -> None:
        """Take all guesses back."""
        for row in list(self._taken):
            self._leave(row)

    def _take(self, row: int, token_id: int) -> bool:
        """Let the row's matcher, if it follows, take a guess; whether the output ends with it."""
        matcher = self._grammars.matcher(row)
        if row not in self._taken or matcher is None:
            return False
        try:
            is_taken = matcher.accept(token_id)
        except GrammarFailed:
            is_taken = False
        if not is_taken:
            self._leave(row)
            return False
        self._taken[row].append(token_id)
        has_ended = matcher.has_ended
        if len(self._taken[row]) == MAX_ROLLBACK:
            self._leave(row)
        return has_ended

    def _go(self, row: int, way: Sequence[int]) -> bool:
        """Let the row's matcher have taken these guesses; whether the output ends with them."""
        matcher, taken = self._grammars.matcher(row), self._taken[row]
        if matcher is None:
            return False
        pairs = zip(taken, way, strict=False)
        num_common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if num_common < len(taken):
            matcher.rollback(len(taken) - num_common)
            del taken[num_common:]
        for token_id in way[num_common:]:
            self._take(row, token_id)
        return row in self._taken and matcher.has_ended

    def _mask(self, row: int) -> NDArray[np.int32] | None:
        """[words] of what may come next in a row; None: nothing is known of that."""
        matcher = self._grammars.matcher(row)
        if row not in self._taken or matcher is None or matcher.has_ended:
            return None
        begin_s = self._clock_s()
        try:
            if not self._taken[row]:
                return self._grammars.next_mask(row)
            mask = np.zeros((1, self._grammars.num_words), dtype=np.int32)
            matcher.fill(mask, 0)
        except GrammarFailed:
            self._leave(row)
            return None
        if self._clock_s() - begin_s > SLOW_STEP_S:
            self._leave(row)
        found: NDArray[np.int32] = mask[0]
        return found

    def _leave(self, row: int) -> None:
        """The row's matcher follows no more guesses."""
        num_taken = len(self._taken.pop(row))
        matcher = self._grammars.matcher(row)
        if matcher is not None and num_taken:
            matcher.rollback(num_taken)
