"""How often guesses are right, by kind: measured, and forgotten with time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from sapwood.schema.draft_tree import ROOT
from sapwood.speculative.interface import Guesses

PRIOR_RATE = 0.4
PRIOR_WEIGHT = 4.0
"""So many observations is it worth what is known without them."""


class Acceptance:
    """The share of right guesses among those whose preceding guesses were right; in a tree, also
    among those whose earlier siblings were wrong, so that the chances of all siblings together are
    never more than 1.

    What is observed loses weight with each further observation of the same kind, so that the rates
    follow a text that changes.
    """

    def __init__(self, *, memory: float, prior: Acceptance | None = None) -> None:
        """memory  weight that an observation keeps after the next one, below 1
        prior   rates that hold before anything is observed; None: PRIOR_RATE"""
        self._memory = memory
        self._prior = prior
        self._counts: dict[int, tuple[float, float]] = {}

    def observe(self, kind: int, *, is_right: bool) -> None:
        right, seen = self._counts.get(kind, (0.0, 0.0))
        self._counts[kind] = (right * self._memory + is_right, seen * self._memory + 1.0)
        if self._prior is not None:
            self._prior.observe(kind, is_right=is_right)

    def rate(self, kind: int) -> float:
        """Between 0 and 1, never reaching them."""
        right, seen = self._counts.get(kind, (0.0, 0.0))
        prior = PRIOR_RATE if self._prior is None else self._prior.rate(kind)
        return (right + PRIOR_WEIGHT * prior) / (seen + PRIOR_WEIGHT)

    def learn(self, guesses: Guesses, token_ids: Sequence[int]) -> None:
        """Compare guesses with the tokens that came, whether or not a step verified them."""
        if guesses.parents:
            self._learn_tree(guesses, token_ids)
            return
        # The last tokens may be beyond the guesses, and the last guesses beyond the tokens.
        for guess, kind, token_id in zip(guesses.token_ids, guesses.kinds, token_ids, strict=False):
            self.observe(kind, is_right=guess == token_id)
            if guess != token_id:
                return

    def survivals(self, guesses: Guesses) -> list[float]:
        """Per guess: how likely it and all guesses before it are right."""
        rates = map(self.rate, guesses.kinds)
        if not guesses.parents:
            return list(accumulate(rates, mul))
        # By parent: how likely it is right, and none of its children so far is.
        left = {ROOT: 1.0}
        found: list[float] = []
        for node, (parent, rate) in enumerate(zip(guesses.parents, rates, strict=True)):
            found.append(left[parent] * rate)
            left[parent] -= found[-1]
            left[node] = found[-1]
        return found

    def _learn_tree(self, guesses: Guesses, token_ids: Sequence[int]) -> None:
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(guesses.parents):
            children.setdefault(parent, []).append(node)
        at = ROOT
        for token_id in token_ids:
            for node in children.get(at, ()):
                is_right = guesses.token_ids[node] == token_id
                self.observe(guesses.kinds[node], is_right=is_right)
                if is_right:
                    at = node
                    break
            else:
                return
