"""Which guesses a step verifies: those with which it brings the most tokens per second."""

from __future__ import annotations

from collections.abc import Sequence

LEAST_GAIN = 1.05
"""Guesses must promise so many times the tokens per second of a step without any."""


def best_guesses(
    survivals: Sequence[Sequence[float]], costs: Sequence[float], num_requests: int
) -> list[list[int]]:
    """Which guesses of each request to verify: their indices, ascending. A guess is never without
    those that it follows.

    survivals     per request: how likely each guess and all those that it follows are right
    costs         seconds of the step with 0, 1, … guesses: at most len(costs) - 1 are chosen
    num_requests  requests of the step that get a token, with guesses or without
    """
    # A guess is never likelier than those that it follows, which have lower indices.
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
    return [sorted(nodes) for nodes in chosen]


def shared_out(survivals: Sequence[Sequence[float]], most: int) -> list[list[int]]:
    """The same without measured costs: all requests alike, `most` guesses in all; of each request
    those that are the likeliest."""
    chosen: list[list[int]] = []
    for number, of_request in enumerate(survivals):
        # Each request's part of what is left, rounded up.
        count = min(len(of_request), -(-most // (len(survivals) - number)))
        ranked = sorted(range(len(of_request)), key=lambda node: (-of_request[node], node))
        chosen.append(sorted(ranked[:count]))
        most -= count
    return chosen
