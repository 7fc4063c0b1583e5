"""Ends the thinking of a request when its budget is used up."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor

from sapwood.schema.step import RowStart
from sapwood.schema.thinking import ThinkingBudget


class _Stage(Enum):
    BEFORE = auto()
    THINKING = auto()
    CLOSING = auto()
    AFTER = auto()


@dataclass(slots=True)
class _Progress:
    """The progress of one request's thinking, and its latest tokens."""

    budget: ThinkingBudget
    stage: _Stage
    num_thought: int = 0
    num_forced: int = 0
    recent: tuple[int, ...] = ()

    def accept(self, token_id: int) -> None:
        budget = self.budget
        kept = max(len(budget.begin), len(budget.end))
        self.recent = (*self.recent, token_id)[-kept:]
        if self.stage is _Stage.BEFORE:
            if self._ends_with(budget.begin):
                self.stage = _Stage.THINKING
                self._close_if_used_up()
        elif self.stage is _Stage.THINKING:
            if self._ends_with(budget.end):
                self.stage = _Stage.AFTER
                return
            self.num_thought += 1
            self._close_if_used_up()
        elif self.stage is _Stage.CLOSING:
            self.num_forced += 1
            if self.num_forced == len(budget.forced):
                self.stage = _Stage.AFTER

    def _close_if_used_up(self) -> None:
        if self.num_thought >= self.budget.max_tokens:
            self.stage = _Stage.CLOSING

    def _ends_with(self, token_ids: tuple[int, ...]) -> bool:
        return self.recent[-len(token_ids) :] == token_ids


class ThinkingBudgets:
    """A logits processor that allows only one token where the thinking's end must be written."""

    def __init__(self) -> None:
        self._rows: dict[int, _Progress] = {}

    @property
    def stateful_rows(self) -> AbstractSet[int]:
        return self._rows.keys()

    def start(self, start: RowStart) -> None:
        self._rows.pop(start.row, None)
        budget = start.options.sampling.thinking_budget
        if budget is None:
            return
        progress = _Progress(budget, _Stage.THINKING if budget.is_open else _Stage.BEFORE)
        if budget.is_open and budget.max_tokens == 0:
            progress.stage = _Stage.CLOSING
        # A retracted request has put out tokens already.
        for token_id in start.output_ids:
            progress.accept(token_id)
        self._rows[start.row] = progress

    def apply(self, logits: Tensor, rows: Sequence[int], num_outputs: Sequence[int]) -> None:
        if not self._rows:
            return
        for index, row in enumerate(rows):
            progress = self._rows.get(row)
            if progress is not None and progress.stage is _Stage.CLOSING:
                forced = progress.budget.forced[progress.num_forced]
                logits[index] = -torch.inf
                logits[index, forced] = 0.0

    def accept(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        if not self._rows:
            return
        for row, token_id in zip(rows, token_ids, strict=True):
            progress = self._rows.get(row)
            if progress is not None:
                progress.accept(token_id)
