"""Guesses of a draft model, which the ranks make: they come with the result of a step."""

from __future__ import annotations

from collections.abc import Sequence

from sapwood.speculative.interface import NO_GUESSES, Guesses


class BroughtDraft:
    """The guesses that the last step of one request brought.

    They are all of one kind, so that what the first guesses show tells whether it is worth guessing
    farther; a kind for each depth would have to be tried before anything is known of it."""

    def __init__(self) -> None:
        self._guesses: list[int] = []

    def bring(self, guesses: Sequence[int]) -> None:
        """These tokens may follow all that the draft knows."""
        self._guesses = list(guesses)

    def extend(self, token_ids: Sequence[int]) -> None:
        if token_ids:
            self._guesses = []

    def propose(self, most: int) -> Guesses:
        token_ids = self._guesses[: max(most, 0)]
        return Guesses(token_ids=token_ids, kinds=[0] * len(token_ids)) if token_ids else NO_GUESSES

    def close(self) -> None:
        """Nothing is kept for other requests."""


class BroughtDrafter:
    def begin(self, namespace: str, prompt_ids: Sequence[int]) -> BroughtDraft:
        return BroughtDraft()
