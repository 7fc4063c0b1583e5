"""Policies that look at nothing of the request."""

from __future__ import annotations

import random
from collections.abc import Sequence

from sapwood.gateway.policies.interface import C, Call


class Random:
    """Any worker."""

    needs_text = False
    prefixes = None

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, candidates: Sequence[C], call: Call) -> C:
        return self._rng.choice(candidates)

    def forget(self, worker_id: str) -> None:
        """Nothing is remembered."""


class RoundRobin:
    """One worker after another."""

    needs_text = False
    prefixes = None

    def __init__(self) -> None:
        self._num_chosen = 0

    def choose(self, candidates: Sequence[C], call: Call) -> C:
        chosen = candidates[self._num_chosen % len(candidates)]
        self._num_chosen += 1
        return chosen

    def forget(self, worker_id: str) -> None:
        """Nothing is remembered about single workers."""


class PowerOfTwo:
    """The less loaded of two workers that are drawn at random.

    Source: Mitzenmacher 2001, "The power of two choices in randomized load balancing"."""

    needs_text = False
    prefixes = None

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, candidates: Sequence[C], call: Call) -> C:
        if len(candidates) == 1:
            return candidates[0]
        one, other = self._rng.sample(candidates, 2)
        return one if one.load <= other.load else other

    def forget(self, worker_id: str) -> None:
        """Nothing is remembered."""
