"""What the engine asks of a drafter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Guesses:
    """How a request may go on.

    token_ids  the first follows the request's last token, each of the others the one before
    kinds      per token: guesses of one kind are right about equally often, given that the tokens
               before them are right. Only the drafter knows what a kind stands for.
    """

    token_ids: Sequence[int] = ()
    kinds: Sequence[int] = ()


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
