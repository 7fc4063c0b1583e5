"""What the engine asks of a drafter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Draft(Protocol):
    """Guesses how one request goes on."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """These tokens follow those that the draft knows."""
        ...

    def propose(self, most: int) -> list[int]:
        """Up to `most` tokens that may follow; none where nothing can be guessed."""
        ...


class Drafter(Protocol):
    def begin(self, prompt_ids: Sequence[int]) -> Draft:
        """The draft of a new request."""
        ...
