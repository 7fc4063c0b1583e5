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

    def children(
        self,
        logits: Tensor,
        rows: Sequence[int],
        num_outputs: Sequence[int],
        ways: Sequence[Sequence[int]],
        count: int,
    ) -> list[list[tuple[int, float]]]:
        """Up to `count` guesses of what follows each entry, in the place of one: first the token
        that `sample` chooses, then the likeliest others; none after an end.

        The chosen token counts as the likeliest one, since another is right only if it is wrong.

        logits, rows, num_outputs  as in `sample`; a row has one entry or several
        ways     the guesses before each entry, since the row's last known token
        Returns  per entry (token id, probability) of each guess, likely ones first"""
        ended = set[int]()
        if self._grammars is not None:
            ended = self._grammars.apply(logits, rows, ways)
        # The logits are as the processors have left them afterwards: kernels do not change them.
        chosen = self._sampler.sample(logits, rows, num_outputs).tolist()
        probs, ids = logits.float().softmax(dim=-1).topk(min(count, logits.shape[1]), dim=-1)
        found: list[list[tuple[int, float]]] = []
        for index, (first, likely, token_ids) in enumerate(
            zip(chosen, probs.tolist(), ids.tolist(), strict=True)
        ):
            others = [token_id for token_id in token_ids if token_id != first]
            pairs = zip([first, *others], likely, strict=False)
            found.append(
                []
                if index in ended
                else [(token_id, p) for token_id, p in pairs if p > 0 or token_id == first]
            )
        return found

    def take(self, rows: Sequence[int], token_ids: Sequence[int]) -> set[int]:
        """The rows go on with these guesses. Returns the rows whose grammar has ended then."""
        return set() if self._grammars is None else self._grammars.take(rows, token_ids)
