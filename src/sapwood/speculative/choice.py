"""Which guesses a step verifies: those with which it brings the most tokens per second."""

from __future__ import annotations

from collections.abc import Sequence

LEAST_GAIN = 1.05
"""Guesses must promise so many times the tokens per second of a step without any."""


def best_guesses(
    survivals: Sequence[Sequence[float]], costs: Sequence[float], num_requests: int
) -> list[int]:
    """How many guesses of each request to verify.

    survivals     per request: how likely each guess and all those before it are right
    costs         seconds of the step with 0, 1, … guesses: at most len(costs) - 1 are chosen
    num_requests  requests of the step that get a token, with guesses or without
    """
    # A guess is never likelier than those before it, so the likeliest of all are first ones.
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
    chosen = [0] * len(survivals)
    for _, _, owner in ranked[:count]:
        chosen[owner] += 1
    return chosen


def shared_out(sizes: Sequence[int], most: int) -> list[int]:
    """Without measurements: all requests alike, `most` guesses in all.

    sizes  guesses of each request
    """
    chosen: list[int] = []
    for number, size in enumerate(sizes):
        # Each request's part of what is left, rounded up.
        chosen.append(min(size, -(-most // (len(sizes) - number))))
        most -= chosen[-1]
    return chosen
