"""The interfaces of a grammar backend, its compiled grammars and their matchers."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sapwood.schema.grammar import Grammar

MAX_ROLLBACK = 256
"""Tokens that a matcher can take back at once. Drafts and forced texts are shorter."""


SLOW_STEP_S = 0.005
"""A step's work on one row's grammar is slow if it takes longer; as a rule it takes 0.1 ms."""
SLOW_BUDGET_S = 0.05
"""Seconds that the slow steps of one request may take in all. An ambiguous grammar takes longer
with each token, and all other requests wait meanwhile."""
TOO_SLOW = "takes too long to follow, as an ambiguous one does; make it simpler"


class GrammarFailed(Exception):
    """An output cannot be continued under its grammar; the message says why."""


class DeadEnd(GrammarFailed):
    """The grammar allows none of the model's tokens here."""


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

    def rollback(self, num_tokens: int) -> None:
        """Take back the last `num_tokens` accepted tokens, an end-of-sequence token included.

        Raises ValueError, and takes none back, if fewer were accepted or `num_tokens` exceeds
        MAX_ROLLBACK."""
        ...


def check_rollback(num_tokens: int, num_taken: int) -> None:
    """ValueError unless a matcher that has taken num_taken tokens can take that many back."""
    most = min(num_taken, MAX_ROLLBACK)
    if not 0 <= num_tokens <= most:
        raise ValueError(f"{num_tokens} tokens cannot be taken back, only 0 to {most}")


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
