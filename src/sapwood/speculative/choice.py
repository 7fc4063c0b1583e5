"""Which guesses a step verifies: those with which it brings the most tokens per second."""

from __future__ import annotations

from collections.abc import Sequence

LEAST_GAIN = 1.05
"""Guesses must promise so many times the tokens per second of a step without any."""


def best_guesses(
    survivals: Sequence[Sequence[float]], costs: Sequence[float], num_requests: int
) -> list[list[int]]:
    """Indices of each request's guesses to verify, in ascending order; a guess comes with those
    that it follows.

    survivals     per request: how likely each guess and all those before it are right
    costs         seconds of the step with 0, 1, … guesses: at most len(costs) - 1 are chosen
    num_requests  requests of the step that get a token, with guesses or without
    """
    # A guess is never likelier than the one that it follows, which comes earlier in the list.
    ranked = sorted(
        (-survival, at, owner)
        for owner, of_request in enumerate(survivals)
        for at, survival in enumerate(of_request)
    )
    expected = float(num_requests)
    best, count = LEAST_GAIN * expected / costs[0], 0
    for number, (minus, _, _) in enumerate(ranked[: len(costs) - 1], start=1):
        expected -= minus
        if expected / costs[number] > best:
            best, count = expected / costs[number], number
    chosen: list[list[int]] = [[] for _ in survivals]
    for _, at, owner in ranked[:count]:
        chosen[owner].append(at)
    for indices in chosen:
        indices.sort()
    return chosen


def shared_out(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Without measurements: the first guesses of each request, all alike, `most` in all."""
    chosen: list[list[int]] = []
    for number, size in enumerate(sizes):
        # Each request's part of what is left, rounded up.
        part = min(size, -(-most // (len(sizes) - number)))
        chosen.append(list(range(part)))
        most -= part
    return chosen
