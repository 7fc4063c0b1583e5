"""Spreads experts over ranks so that all have about as much to compute: pure functions.

Source: the greedy packing is Graham 1969, doi:10.1137/0117039, with as many slots on each rank."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def busiest(placement: Sequence[int], loads: Sequence[int], num_ranks: int) -> float:
    """Load of the rank that has the most to compute. An expert's copies share its load evenly.

    placement  the expert of each slot; slots of a rank lie together
    loads      of each expert
    """
    copies = [0] * len(loads)
    for expert in placement:
        copies[expert] += 1
    size = len(placement) // num_ranks
    return max(
        sum(loads[expert] / copies[expert] for expert in placement[first : first + size])
        for first in range(0, len(placement), size)
    )


def balanced(placement: Sequence[int], loads: Sequence[int], num_ranks: int) -> tuple[int, ...]:
    """The expert of each slot, so that the busiest rank has less to compute than now; `placement`
    if none such is found.

    Every expert keeps at least one slot, and stays where it is if its rank keeps it."""
    found = _packed(loads, len(placement), num_ranks)
    if found is None:
        return tuple(placement)
    kept = _near(placement, found)
    is_better = busiest(kept, loads, num_ranks) < busiest(placement, loads, num_ranks)
    return kept if is_better else tuple(placement)


def _packed(loads: Sequence[int], num_slots: int, num_ranks: int) -> list[list[int]] | None:
    """Experts of each rank; None if the greedy way ends with a rank that had an expert twice."""
    copies = [1] * len(loads)
    heaviest: list[tuple[float, int]] = [(-load, expert) for expert, load in enumerate(loads)]
    heapq.heapify(heaviest)
    for _ in range(num_slots - len(loads)):
        _, expert = heapq.heappop(heaviest)
        copies[expert] += 1
        if copies[expert] < num_ranks:
            heapq.heappush(heaviest, (-loads[expert] / copies[expert], expert))
    # The experts with the most copies first among equals: they have the fewest ranks to choose.
    order = sorted(
        (expert for expert, count in enumerate(copies) for _ in range(count)),
        key=lambda expert: (-loads[expert] / copies[expert], -copies[expert], expert),
    )
    room = num_slots // num_ranks
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    has = [0.0] * num_ranks
    for expert in order:
        free = [r for r in range(num_ranks) if len(ranks[r]) < room and expert not in ranks[r]]
        if not free:
            return None
        rank = min(free, key=lambda r: (has[r], r))
        ranks[rank].append(expert)
        has[rank] += loads[expert] / copies[expert]
    return ranks


def _near(placement: Sequence[int], ranks: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The same sets of experts, each for the rank that has the most of it, and there in the slots
    that have them now."""
    room = len(placement) // len(ranks)
    left = list(range(len(ranks)))
    found: list[int] = []
    for first in range(0, len(placement), room):
        now = placement[first : first + room]
        best = max(left, key=lambda index: (len(set(now) & set(ranks[index])), -index))
        left.remove(best)
        coming = [expert for expert in ranks[best] if expert not in now]
        for expert in now:
            found.append(expert if expert in ranks[best] else coming.pop())
    return tuple(found)
