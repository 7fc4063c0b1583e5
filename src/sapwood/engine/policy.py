"""Schedule policies: pure functions that put the waiting requests into an order.

Every policy looks at `priority` first (larger is sooner) and keeps the order of arrival among
equals.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sapwood.base.registry import Registry

LPM_QUEUE_LIMIT = 128
"""Longer queues are served first come, first served: matching all of them costs too much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A waiting request as a policy sees it.

    priority        the request's urgency now
    max_new_tokens  output tokens that the request may still produce
    path            (node identity, matching tokens) along the request's longest known prefix
    num_same_key    running requests with the same routing key; 0 if the request has none
    """

    index: int
    priority: int
    arrival: int
    max_new_tokens: int
    path: Sequence[tuple[int, int]] = ()
    num_same_key: int = 0

    @property
    def num_hit_tokens(self) -> int:
        return sum(num_tokens for _, num_tokens in self.path)


@dataclass(slots=True)
class _Branch:
    """A node of the prefix tree with the waiting requests that match it."""

    weight: int = 0
    ending: list[Waiting] = field(default_factory=list)
    children: dict[int, _Branch] = field(default_factory=dict)


def first_come(waiting: Sequence[Waiting], rng: random.Random) -> list[Waiting]:
    return sorted(waiting, key=lambda request: (-request.priority, request.arrival))


def longest_prefix(waiting: Sequence[Waiting], rng: random.Random) -> list[Waiting]:
    return sorted(
        waiting, key=lambda request: (-request.priority, -request.num_hit_tokens, request.arrival)
    )


def longest_output(waiting: Sequence[Waiting], rng: random.Random) -> list[Waiting]:
    return sorted(
        waiting, key=lambda request: (-request.priority, -request.max_new_tokens, request.arrival)
    )


def routing_key(waiting: Sequence[Waiting], rng: random.Random) -> list[Waiting]:
    """First the routing keys that most running requests have: they share prefixes too."""
    return sorted(
        waiting, key=lambda request: (-request.priority, -request.num_same_key, request.arrival)
    )


def shuffled(waiting: Sequence[Waiting], rng: random.Random) -> list[Waiting]:
    order = list(waiting)
    rng.shuffle(order)
    return sorted(order, key=lambda request: -request.priority)


def depth_first_weight(waiting: Sequence[Waiting], rng: random.Random) -> list[Waiting]:
    """Depth first over the prefix tree, the subtree with most waiting requests first.

    Requests below one node come together, so that its prefix is used before it can be evicted.
    """
    root = _Branch()
    for request in waiting:
        branch = root
        branch.weight += 1
        for node, _ in request.path:
            branch = branch.children.setdefault(node, _Branch())
            branch.weight += 1
        branch.ending.append(request)
    order: list[Waiting] = []
    stack = [root]
    while stack:
        branch = stack.pop()
        order += branch.ending
        stack += sorted(branch.children.values(), key=lambda child: child.weight)
    rank = {request.index: position for position, request in enumerate(order)}
    return sorted(waiting, key=lambda request: (-request.priority, rank[request.index]))


@dataclass(frozen=True, slots=True)
class Policy:
    """A schedule policy.

    order       puts waiting requests into an order
    needs_path  whether the order depends on the prefix tree
    needs_keys  whether the order depends on routing keys
    """

    order: Callable[[Sequence[Waiting], random.Random], list[Waiting]]
    needs_path: bool = False
    needs_keys: bool = False


FIRST_COME = Policy(first_come)
LONGEST_PREFIX = Policy(longest_prefix, needs_path=True)
DEPTH_FIRST = Policy(depth_first_weight, needs_path=True)
LONGEST_OUTPUT = Policy(longest_output)
SHUFFLED = Policy(shuffled)
ROUTING_KEY = Policy(routing_key, needs_keys=True)

SCHEDULE_POLICIES = Registry[Policy](
    "schedule policy",
    {
        "fcfs": f"{__name__}:FIRST_COME",
        "priority": f"{__name__}:FIRST_COME",
        "lpm": f"{__name__}:LONGEST_PREFIX",
        "dfs-weight": f"{__name__}:DEPTH_FIRST",
        "lof": f"{__name__}:LONGEST_OUTPUT",
        "random": f"{__name__}:SHUFFLED",
        "routing-key": f"{__name__}:ROUTING_KEY",
    },
    entry_point="sapwood.schedule_policies",
)
"""By the names of --schedule-policy; packages add theirs by entry points (docs/hardware.md)."""
