"""Chooses the tokens that a draft model guesses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from sapwood.executor.grammar.ahead import GrammarsAhead
from sapwood.executor.sampling.sampler import Sampler


class GuessSampler:
    """Chooses guesses as the model's tokens are chosen, so that where the models agree they are
    right: with the same random numbers, biases, penalties and grammars.

    Penalties are those after the tokens that the request has; guesses do not count.
    """

    def __init__(self, sampler: Sampler, grammars: GrammarsAhead | None) -> None:
        """A sampler of guesses.

        sampler   with processors that the model's own sampler has too, but without grammars
        grammars  None: no request has one"""
        self._sampler = sampler
        self._grammars = grammars

    @contextmanager
    def guessing(self, rows: Sequence[int]) -> Iterator[None]:
        """Meanwhile guesses for these rows are chosen, one after the other."""
        if self._grammars is None:
            yield
            return
        self._grammars.begin(rows)
        try:
            yield
        finally:
            self._grammars.end()

    def sample(self, logits: Tensor, rows: Sequence[int], num_outputs: Sequence[int]) -> Tensor:
        """As Sampler.sample; num_outputs count the guesses so far."""
        if self._grammars is not None:
            self._grammars.apply(logits, rows)
        return self._sampler.sample(logits, rows, num_outputs)

    def take(self, rows: Sequence[int], token_ids: Sequence[int]) -> set[int]:
        """The rows go on with these guesses. Returns the rows whose grammar has ended then."""
        return set() if self._grammars is None else self._grammars.take(rows, token_ids)
