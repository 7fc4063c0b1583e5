"""Holds the tokens of each constrained request to its grammar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood.executor.grammar.interface import (
    SLOW_BUDGET_S,
    SLOW_STEP_S,
    TOO_SLOW,
    CompiledGrammar,
    GrammarFailed,
    Matcher,
)
from sapwood.executor.grammar.jump import forced_tokens
from sapwood.executor.grammar.thinking import AfterThinking
from sapwood.executor.grammar.vocabulary import Vocabulary
from sapwood.kernels.interface import Kernels
from sapwood.schema.grammar import Grammar
from sapwood.schema.step import RowStart

SLOW_JUMP_S = 0.02
"""The same for following forced text, 64 masks of which take 2 ms as a rule."""
SLOW_SHARE = 0.1
"""Of each second, what the slow steps of all rows together may take. A row with which they have
taken more pauses until that is made up for."""
MOST_SLOW_AT_ONCE_S = 0.25
"""What they may take at once; a row that takes more fails, since all other requests wait for it."""


class Compiled(Protocol):
    """Has the compiled grammars."""

    def compiled(self, grammar: Grammar) -> CompiledGrammar | None:
        """None if it was released: all requests that needed it have left.

        Raises GrammarFailed if it was found to be too slow."""
        ...

    def refuse_slow(self, grammar: Grammar, reason: str) -> None:
        """Refuse that grammar from now on, for that reason."""
        ...


@dataclass(slots=True)
class _Constrained:
    """The grammar of a row.

    may_jump   tokens may be put out without being sampled
    may_empty  other processors may have forbidden all tokens that the grammar allows
    spare_s    seconds that steps of this row may still take beyond SLOW_STEP_S each
    next_mask  [1, words] of the next token, if it is known already
    """

    row: int
    grammar: Grammar
    matcher: Matcher
    may_jump: bool
    may_empty: bool
    spare_s: float = SLOW_BUDGET_S
    next_mask: NDArray[np.int32] | None = None


class GrammarMasks:
    """Called by the sampler after all processors have changed the logits.

    grammars    has the compiled grammars
    failures    row -> why its request cannot go on; written here, read by the sampler
    vocabulary  called once, when the first grammar comes
    may_jump    whether tokens that the grammar leaves no choice about are put out without sampling
    clock_s     seconds of this thread's processor time, to find grammars that are slow to follow
    wall_s      seconds that pass
    """

    def __init__(
        self,
        grammars: Compiled,
        kernels: Kernels,
        *,
        num_rows: int,
        vocab_size: int,
        failures: dict[int, str],
        vocabulary: Callable[[], Vocabulary],
        may_jump: bool = False,
        clock_s: Callable[[], float] = time.thread_time,
        wall_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock_s = clock_s
        self._wall_s = wall_s
        self._shared_s = SLOW_SHARE
        self._refilled_s = wall_s()
        self._grammars = grammars
        self._kernels = kernels
        self._failures = failures
        self._vocabulary = vocabulary
        self._may_jump = may_jump
        self._rows: dict[int, _Constrained] = {}
        self._pauses: dict[int, float] = {}
        self._words = -(-vocab_size // 32)
        self._masks = np.zeros((min(num_rows, 8), self._words), dtype=np.int32)

    @property
    def stateful_rows(self) -> AbstractSet[int]:
        return self._rows.keys()

    def start(self, start: RowStart) -> None:
        """Another request takes the row; if it was retracted, it already has some output."""
        self.end(start.row)
        grammar = start.options.sampling.grammar
        if grammar is None:
            return
        try:
            compiled = self._grammars.compiled(grammar)
        except GrammarFailed as error:
            self._failures[start.row] = str(error)
            return
        if compiled is None:
            # The request was aborted between the step's plan and now.
            self._failures[start.row] = "the request has ended"
            return
        matcher: Matcher
        if grammar.thinking is None:
            matcher = compiled.matcher()
        else:
            matcher = AfterThinking(grammar.thinking, compiled.matcher, self._vocabulary())
        try:
            matches = all(matcher.accept(token_id) for token_id in start.output_ids)
        except GrammarFailed as error:
            self._failures[start.row] = str(error)
            return
        if not matches:
            self._failures[start.row] = "the output so far does not match its grammar"
            return
        self._rows[start.row] = _Constrained(
            start.row,
            grammar,
            matcher,
            may_jump=self._may_jump
            and start.options.logprobs is None
            and not start.options.tells_of_tokens,
            may_empty=bool(
                start.options.sampling.min_new_tokens
                or start.options.sampling.custom_logit_processor is not None
            ),
        )

    def end(self, row: int) -> None:
        """The request of that row has left."""
        self._rows.pop(row, None)
        self._pauses.pop(row, None)

    def take_pauses(self) -> dict[int, float]:
        """Row -> seconds during which it shall not step, for the rows that were slow since the last
        call."""
        taken, self._pauses = self._pauses, {}
        return taken

    @property
    def num_words(self) -> int:
        """Of a mask."""
        return self._words

    def matcher(self, row: int) -> Matcher | None:
        """The matcher of a row; None if it has no grammar."""
        constrained = self._rows.get(row)
        return None if constrained is None else constrained.matcher

    def next_mask(self, row: int) -> NDArray[np.int32]:
        """[words] of the next token of a row with a grammar that has not ended; kept until the
        token is sampled. Raises GrammarFailed."""
        constrained = self._rows[row]
        if constrained.next_mask is None:
            mask = np.zeros((1, self._words), dtype=np.int32)
            with self._timed(constrained):
                constrained.matcher.fill(mask, 0)
            constrained.next_mask = mask
        found: NDArray[np.int32] = constrained.next_mask[0]
        return found

    def apply(self, logits: Tensor, rows: Sequence[int]) -> None:
        """Forbid in logits [S, vocab], in place, what the grammar of rows[i] does not allow."""
        if not self._rows:
            return
        at: list[int] = []
        for index, row in enumerate(rows):
            constrained = self._rows.get(row)
            if constrained is None or constrained.matcher.has_ended:
                continue
            if len(at) == len(self._masks):
                self._masks = np.concatenate((self._masks, np.zeros_like(self._masks)))
            try:
                self._fill(constrained, len(at))
            except GrammarFailed as error:
                self._fail(row, str(error))
                continue
            at.append(index)
        if not at:
            return
        masks = torch.from_numpy(self._masks[: len(at)])
        self._kernels.mask_logits(logits, masks, at)
        for place, index in enumerate(at):
            if self._rows[rows[index]].may_empty:
                self._allow_something(logits, masks, place, index)

    def _allow_something(self, logits: Tensor, masks: Tensor, place: int, index: int) -> None:
        """The grammar prevails where it and the processors leave no token: for instance where the
        grammar can only end, and min_new_tokens forbids the end."""
        if logits[index].max() == -torch.inf:
            logits[index] = 0.0
            self._kernels.mask_logits(logits, masks[place : place + 1], [index])

    def accept(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        """These tokens were chosen."""
        if not self._rows:
            return
        for row, token_id in zip(rows, token_ids, strict=True):
            constrained = self._rows.get(row)
            if constrained is None or constrained.matcher.has_ended:
                continue
            try:
                constrained.next_mask = None
                with self._timed(constrained):
                    matches = constrained.matcher.accept(token_id)
            except GrammarFailed as error:
                self._fail(row, str(error))
                continue
            if not matches:
                self._fail(row, f"token {token_id} was sampled but does not match the grammar")

    def jump(self, rows: Sequence[int]) -> dict[int, list[int]]:
        """Row -> the tokens that must come next in any case; its grammar has taken them already."""
        if not self._rows or not self._may_jump:
            return {}
        jumps: dict[int, list[int]] = {}
        for row in rows:
            constrained = self._rows.get(row)
            if constrained is None or not constrained.may_jump or constrained.matcher.has_ended:
                continue
            try:
                taken = self._jump(constrained)
            except GrammarFailed as error:
                self._fail(row, str(error))
                continue
            if taken:
                jumps[row] = taken
        return jumps

    def _jump(self, row: _Constrained) -> list[int]:
        matcher = row.matcher
        mask = np.zeros((1, self._words), dtype=np.int32)
        taken: list[int] = []
        with self._timed(row, SLOW_JUMP_S):
            matcher.fill(mask, 0)
            for token_id in forced_tokens(matcher, mask, self._vocabulary()):
                if not matcher.accept(token_id):
                    break
                taken.append(token_id)
        if not taken:
            row.next_mask = mask
        return taken

    def _fill(self, row: _Constrained, index: int) -> None:
        """Write the mask of that row's next token to self._masks[index]."""
        if row.next_mask is not None:
            self._masks[index] = row.next_mask[0]
            row.next_mask = None
            return
        with self._timed(row):
            row.matcher.fill(self._masks, index)

    @contextmanager
    def _timed(self, row: _Constrained, slow_s: float = SLOW_STEP_S) -> Iterator[None]:
        """GrammarFailed once the slow work of the row, what takes longer than slow_s each time,
        has taken more than SLOW_BUDGET_S; a pause once that of all rows has taken more than their
        share of time."""
        begin_s = self._clock_s()
        yield
        slow = max(0.0, self._clock_s() - begin_s - slow_s)
        row.spare_s -= slow
        if row.spare_s < 0:
            self._grammars.refuse_slow(row.grammar, f"the grammar {TOO_SLOW}")
            raise GrammarFailed(f"the grammar {TOO_SLOW}")
        owed_s = self._owed_after(slow) if slow else 0.0
        if owed_s > MOST_SLOW_AT_ONCE_S:
            raise GrammarFailed(
                "the grammars of this and of other requests take too long to follow together; send "
                "the request again later, or make its grammar simpler"
            )
        if owed_s:
            self._pauses[row.row] = owed_s / SLOW_SHARE

    def _owed_after(self, seconds: float) -> float:
        """By how much all rows together have exceeded what slow steps may take, with these."""
        now_s = self._wall_s()
        refill_s = SLOW_SHARE * (now_s - self._refilled_s)
        self._shared_s = min(SLOW_SHARE, self._shared_s + refill_s) - seconds
        self._refilled_s = now_s
        return max(0.0, -self._shared_s)

    def _fail(self, row: int, reason: str) -> None:
        self._failures[row] = reason
        self._pauses.pop(row, None)
        del self._rows[row]
