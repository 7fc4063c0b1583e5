"""What is told of each token of one request, such as its hidden state, on its way to the client."""

from __future__ import annotations

from collections.abc import Sequence


class PerToken:
    """Passes on each token's part once, in order, even after a retraction.

    num_known  number of tokens, from the request's first on, whose parts have come
    """

    def __init__(self) -> None:
        self.num_known = 0
        self._untold: list[bytes] = []

    def num_wanted(self, first: int, num_new: int) -> int:
        """How many of the tokens first .. first + num_new have not come yet."""
        return min(num_new, max(first + num_new - self.num_known, 0))

    def take(self, first: int, brought: Sequence[bytes]) -> None:
        """Take the parts of the tokens from `first` on."""
        assert first <= self.num_known, "a token was left out"
        new = brought[self.num_known - first :]
        self._untold += new
        self.num_known += len(new)

    def to_tell(self) -> list[bytes]:
        """The parts that have come since the last call."""
        told, self._untold = self._untold, []
        return told
