"""The hidden states of one request's tokens on their way to the client."""

from __future__ import annotations

from collections.abc import Sequence


class HiddenStates:
    """Each token's once, in order, though a retraction lets some be computed twice.

    num_known  the first so many tokens of the request have brought theirs
    """

    def __init__(self) -> None:
        self.num_known = 0
        self._untold: list[bytes] = []

    def num_wanted(self, first: int, num_new: int) -> int:
        """Of `num_new` tokens from `first` on that are to be computed, those that brought none."""
        return min(num_new, max(first + num_new - self.num_known, 0))

    def take(self, first: int, brought: Sequence[bytes]) -> None:
        """What the tokens from `first` on brought."""
        assert first <= self.num_known, "a token was left out"
        new = brought[self.num_known - first :]
        self._untold += new
        self.num_known += len(new)

    def to_tell(self) -> list[bytes]:
        """Those taken since the last call."""
        told, self._untold = self._untold, []
        return told
