"""How many guesses a draft model makes in a row: as many as promise the most tokens per second."""

from __future__ import annotations

from collections.abc import Sequence

from sapwood.speculative.choice import LEAST_GAIN
from sapwood.speculative.costs import StepCosts

TRIED_EVERY = 32
"""Steps without guesses after which there is one all the same, or nobody would know when guesses
became right."""
MEMORY = 0.9


class DraftDepth:
    """Knows what a guess costs, and so how many to ask for.

    All requests of a step are guessed for together, so a guess more for one of them costs about as
    much as for all. The guesses that are verified are chosen by the next step, from what is there.
    """

    def __init__(self, costs: StepCosts, *, breadth: int = 1) -> None:
        """breadth  tokens that a step verifies for each guess in a row, where guesses are trees"""
        self._costs = costs
        self._breadth = breadth
        self._guess_s: dict[int, float] = {}
        self._num_idle = 0

    def observe(self, num_requests: int, num_guesses: int, seconds: float) -> None:
        """So many guesses in a row for so many requests took that long."""
        # What waited for other programs is measured too long, never too short.
        size, each = num_requests.bit_length(), seconds / num_guesses
        longer = MEMORY * self._guess_s.get(size, each) + (1 - MEMORY) * each
        self._guess_s[size] = min(each, longer)

    def best(self, survivals: Sequence[Sequence[float]], num_requests: int) -> int:
        """The number of guesses to ask for.

        survivals  per request that may have guesses: how likely the first, the first two, … are
                   all right
        num_requests  that get a token in the next step, with guesses or without
        """
        deepest = max(map(len, survivals), default=0)
        guess_s = self._guess_s.get(num_requests.bit_length())
        if guess_s is None:
            return deepest  # nothing is known yet
        most = self._breadth * sum(map(len, survivals))
        costs = self._costs.by_tokens(num_requests, num_requests, num_requests + most)
        expected, num_tokens, found = float(num_requests), num_requests, 0
        best = LEAST_GAIN * expected / costs[0]
        for depth in range(1, deepest + 1):
            gains = [one[depth - 1] for one in survivals if len(one) >= depth]
            expected += sum(gains)
            num_tokens += self._breadth * len(gains)
            rate = expected / (costs[num_tokens - num_requests] + depth * guess_s)
            if rate > best:
                best, found = rate, depth
        if found or not deepest:
            self._num_idle = 0
            return found
        self._num_idle += 1
        return 1 if self._num_idle % TRIED_EVERY == 0 else 0
