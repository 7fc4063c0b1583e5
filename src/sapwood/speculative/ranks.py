"""Drafts that a draft model makes on the ranks: they come with the result of a step."""

from __future__ import annotations

from collections.abc import Sequence


class BroughtDraft:
    """The guesses that the last step of one request brought."""

    def __init__(self) -> None:
        self._guesses: list[int] = []

    def bring(self, guesses: Sequence[int]) -> None:
        """These tokens may follow all that the draft knows."""
        self._guesses = list(guesses)

    def extend(self, token_ids: Sequence[int]) -> None:
        if token_ids:
            self._guesses = []

    def propose(self, most: int) -> list[int]:
        return self._guesses[: max(most, 0)]
