"""The interfaces of a grammar backend, its compiled grammars and their matchers."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sapwood.schema.grammar import Grammar


class GrammarFailed(Exception):
    """An output cannot be continued under its grammar; the message says why."""


class Matcher(Protocol):
    """The place in a grammar that one output has reached."""

    @property
    def has_ended(self) -> bool:
        """An end-of-sequence token was taken; nothing follows."""
        ...

    def fill(self, masks: NDArray[np.int32], index: int) -> None:
        """Write masks[index], of masks [n, ceil(vocab / 32)] C-contiguous: bit t % 32 of word
        t // 32 is 1 where token t may come next. Not to be called once the output has ended.

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
        """Take back the last `num_tokens` tokens, taken while `can_roll_back` was true."""
        ...


class CompiledGrammar(Protocol):
    """Safe to use from several threads; its matchers are not."""

    @property
    def num_bytes(self) -> int:
        """Memory that the compiled grammar takes, roughly."""
        ...

    def matcher(self) -> Matcher:
        """A new matcher at the grammar's beginning."""
        ...


class GrammarBackend(Protocol):
    name: str

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Takes milliseconds to seconds; may be called from several threads. The grammar's
        `thinking` plays no part here.

        Raises InvalidRequest, naming what is wrong, if the grammar cannot be enforced exactly."""
        ...
