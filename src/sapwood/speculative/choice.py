"""Which guesses a step verifies: those with which it brings the most tokens per second."""

from __future__ import annotations

from collections.abc import Sequence

LEAST_GAIN = 1.05
"""Guesses must promise so many times the tokens per second of a step without any."""


def best_guesses(
    survivals: Sequence[Sequence[float]],
    costs: Sequence[float],
    num_requests: int,
    *,
    most_each: int | None = None,
) -> list[list[int]]:
    """Which guesses of each request to verify: their indices, ascending. A guess is never without
    those that it follows.

    survivals     per request: how likely each guess and all those that it follows are right
    costs         seconds of the step with 0, 1, … guesses: at most len(costs) - 1 are chosen
    num_requests  requests of the step that get a token, with guesses or without
    most_each     guesses of one request at most; None: any number
    """
    # A guess is never likelier than those that it follows, which have lower indices.
    ranked = sorted(
        (-survival, at, owner)
        for owner, of_request in enumerate(survivals)
        for survival, at in _likeliest(of_request, most_each)
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


def shared_out(
    survivals: Sequence[Sequence[float]], most: int, *, most_each: int | None = None
) -> list[list[int]]:
    """The same without measured costs: all requests alike, `most` guesses in all; of each request
    those that are the likeliest."""
    chosen: list[list[int]] = []
    for number, of_request in enumerate(survivals):
        # Each request's part of what is left, rounded up.
        share = -(-most // (len(survivals) - number))
        ranked = _likeliest(of_request, share if most_each is None else min(share, most_each))
        chosen.append(sorted(node for _, node in ranked))
        most -= len(ranked)
    return chosen


def _likeliest(of_request: Sequence[float], most: int | None) -> list[tuple[float, int]]:
    """(how likely, index) of so many guesses."""
    ranked = sorted((-survival, node) for node, survival in enumerate(of_request))
    return [(-minus, node) for minus, node in ranked[:most]]
