"""What a grammar backend is."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sapwood.schema.grammar import Grammar


class GrammarFailed(Exception):
    """A compiled grammar that cannot be gone on with; the message says why."""


class Matcher(Protocol):
    """The place in a grammar that one output has reached."""

    @property
    def has_ended(self) -> bool:
        """An end-of-sequence token was taken; nothing follows."""
        ...

    def fill(self, masks: NDArray[np.int32], index: int) -> None:
        """Write masks[index], of masks [n, ceil(vocab / 32)] C-contiguous: bit t % 32 of word
        t // 32 is 1 where token t may come next. Not to be called once it has ended.

        Raises GrammarFailed if no token may come, or if finding out would take too long."""
        ...

    def accept(self, token_id: int) -> bool:
        """Take that token; False, and nothing is taken, if it may not come here.

        Raises GrammarFailed if finding out would take too long."""
        ...

    @property
    def can_roll_back(self) -> bool:
        """Whether tokens taken from here on may be taken back."""
        ...

    def rollback(self, num_tokens: int) -> None:
        """Take back that many tokens, which were taken since it could be rolled back."""
        ...


class CompiledGrammar(Protocol):
    """Safe to use from several threads; its matchers are not."""

    @property
    def num_bytes(self) -> int:
        """Memory it takes, roughly."""
        ...

    def matcher(self) -> Matcher:
        """At the grammar's beginning."""
        ...


class GrammarBackend(Protocol):
    name: str

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Takes milliseconds to seconds; may be called from several threads. `thinking` is not
        looked at.

        Raises InvalidRequest, naming what is wrong, if the grammar cannot be enforced exactly."""
        ...
