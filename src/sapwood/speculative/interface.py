"""What the engine asks of a drafter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sapwood.schema.draft_tree import ROOT


@dataclass(frozen=True, slots=True, kw_only=True)
class Guesses:
    """How a request may go on.

    token_ids  the first follows the request's last token, each of the others the one before, or
               the one that `parents` says
    kinds      per token: guesses of one kind are right about equally often, given that the tokens
               before them are right, and that the guesses before them which follow the same token
               are wrong. Only the drafter knows what a kind stands for.
    parents    of a tree of guesses, as in schema/draft_tree.py; empty: a chain. The likeliest way
               through the tree comes first, so that its keys need not move
    """

    token_ids: Sequence[int] = ()
    kinds: Sequence[int] = ()
    parents: Sequence[int] = ()

    def only(self, nodes: Sequence[int]) -> Guesses:
        """The guesses of these indices, ascending; with a guess, all that it follows are there."""
        if not self.parents:
            assert not nodes or nodes[-1] == len(nodes) - 1, "a chain has no gaps"
            return Guesses(token_ids=self.token_ids[: len(nodes)], kinds=self.kinds[: len(nodes)])
        place = {ROOT: ROOT} | {node: index for index, node in enumerate(nodes)}
        parents = [place[self.parents[node]] for node in nodes]
        is_chain = parents == list(range(ROOT, len(nodes) - 1))
        return Guesses(
            token_ids=[self.token_ids[node] for node in nodes],
            kinds=[self.kinds[node] for node in nodes],
            parents=() if is_chain else parents,
        )


NO_GUESSES = Guesses()


class Draft(Protocol):
    """Guesses how one request goes on."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """These tokens follow those that the draft knows."""
        ...

    def propose(self, most: int) -> Guesses:
        """Up to `most` tokens that may follow; none where nothing can be guessed."""
        ...

    def close(self) -> None:
        """The request has ended."""
        ...


class Drafter(Protocol):
    def begin(self, namespace: str, prompt_ids: Sequence[int]) -> Draft:
        """The draft of a new request. Text of other namespaces must not show in its guesses."""
        ...
