"""Guesses of a draft model, which the ranks make: they come with the result of a step."""

from __future__ import annotations

from collections.abc import Sequence

from sapwood.schema.draft_tree import ROOT, depths
from sapwood.schema.step import GuessedTokens
from sapwood.speculative.interface import NO_GUESSES, Guesses


class BroughtDraft:
    """The guesses that the last step of one request brought.

    A guess has a kind by how many others before it follow the same token. Guesses of all depths are
    of one kind, so that what the first guesses show tells whether it is worth guessing farther; a
    kind for each depth would have to be tried before anything is known of it."""

    def __init__(self) -> None:
        self._guesses = NO_GUESSES

    def bring(self, guessed: GuessedTokens) -> None:
        """These tokens may follow all that the draft knows."""
        self._guesses = Guesses(
            token_ids=guessed.token_ids,
            kinds=_places_among_siblings(guessed.parents) or [0] * len(guessed.token_ids),
            parents=guessed.parents,
        )

    def extend(self, token_ids: Sequence[int]) -> None:
        if token_ids:
            self._guesses = NO_GUESSES

    def propose(self, most: int) -> Guesses:
        guesses = self._guesses
        if not guesses.parents:
            return guesses.only(range(min(max(most, 0), len(guesses.token_ids))))
        nodes = [node for node, depth in enumerate(depths(guesses.parents)) if depth <= most]
        return guesses.only(nodes)

    def close(self) -> None:
        """Nothing is kept for other requests."""


class BroughtDrafter:
    def begin(self, namespace: str, prompt_ids: Sequence[int]) -> BroughtDraft:
        return BroughtDraft()


def siblings(breadth: int) -> Guesses:
    """Any guesses of so many kinds, which all follow the same token."""
    return Guesses(token_ids=range(breadth), kinds=range(breadth), parents=[ROOT] * breadth)


def _places_among_siblings(parents: Sequence[int]) -> list[int]:
    counts: dict[int, int] = {}
    found: list[int] = []
    for parent in parents:
        found.append(counts.get(parent, 0))
        counts[parent] = found[-1] + 1
    return found
