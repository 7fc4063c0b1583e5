"""Masks of tokens that are only guessed: a guess that the grammar forbids would never be right."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood.executor.grammar.interface import MAX_ROLLBACK, GrammarFailed
from sapwood.executor.grammar.masks import SLOW_STEP_S, GrammarMasks
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
        # By row, while it is guessed: how many guesses its matcher has taken.
        self._num_taken: dict[int, int] = {}

    def begin(self, rows: Sequence[int]) -> None:
        """Guesses for these rows follow; all tokens before are accepted."""
        assert not self._num_taken, "the guesses before were taken back"
        self._num_taken = {row: 0 for row in rows if self._grammars.matcher(row) is not None}

    def apply(self, logits: Tensor, rows: Sequence[int]) -> None:
        """Forbid in logits [S, vocab], in place, what the grammar of rows[i] does not allow."""
        at: list[int] = []
        masks: list[NDArray[np.int32]] = []
        for index, row in enumerate(rows):
            mask = self._mask(row)
            if mask is not None:
                at.append(index)
                masks.append(mask)
        if at:
            self._kernels.mask_logits(logits, torch.from_numpy(np.stack(masks)), at)

    def take(self, rows: Sequence[int], token_ids: Sequence[int]) -> set[int]:
        """These tokens are guessed. Returns the rows whose output ends with them."""
        ended = set[int]()
        for row, token_id in zip(rows, token_ids, strict=True):
            matcher = self._grammars.matcher(row)
            if row not in self._num_taken or matcher is None:
                continue
            try:
                is_taken = matcher.accept(token_id)
            except GrammarFailed:
                is_taken = False
            if not is_taken:
                self._leave(row)
                continue
            self._num_taken[row] += 1
            if matcher.has_ended:
                ended.add(row)
            if self._num_taken[row] == MAX_ROLLBACK:
                self._leave(row)
        return ended

    def end(self) -> None:
        """Take all guesses back."""
        for row in list(self._num_taken):
            self._leave(row)

    def _mask(self, row: int) -> NDArray[np.int32] | None:
        """[words] of what may come next in a row; None: nothing is known of that."""
        matcher = self._grammars.matcher(row)
        if row not in self._num_taken or matcher is None or matcher.has_ended:
            return None
        begin_s = self._clock_s()
        try:
            if self._num_taken[row] == 0:
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
        num_taken = self._num_taken.pop(row)
        matcher = self._grammars.matcher(row)
        if matcher is not None and num_taken:
            matcher.rollback(num_taken)
