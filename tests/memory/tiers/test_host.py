"""The host tier: a slot stays with its page until the plan that copies it was executed."""

from __future__ import annotations

from collections.abc import Sequence

from sapwood.memory.listener import Stretch
from sapwood.memory.prefix_tree import PrefixTree, token_key
from sapwood.memory.tiers.host import HostTier
from sapwood.schema.config.tiers import WritePolicy


def saved(host: HostTier, tokens: Sequence[int], pages: Sequence[int]) -> list[bytes]:
    """The digests of pages of one token, which the next plan copies to the host."""
    digests: list[bytes] = []

    class Heard:
        def saved(self, stretch: Stretch, copies: Sequence[tuple[bytes, object]]) -> None:
            digests.extend(digest for digest, _ in reversed(copies))

        def dropped(self, pool: int, digest: bytes) -> None:
            pass

    host.listeners = [Heard()]
    tree = PrefixTree(1, lambda num_hits, last_used: (last_used,), listener=host)
    tree.insert("", token_key(tokens), pages)
    return digests


def test_a_slot_of_a_plan_is_nobody_elses_until_it_was_executed() -> None:
    host = HostTier([2], WritePolicy.WRITE_THROUGH)
    first, second = saved(host, [1, 2], [5, 6])
    saves, _ = host.take_orders(step=7)
    assert {(save.source, save.target) for save in saves} == {(5, 1), (6, 0)}
    assert host.slots[0].add(b"read ahead") is None, "a thread would write where the plan does"
    host.executed(7)
    host.load(0, second, number=9)
    _, loads = host.take_orders(step=8)
    assert [(load.source, load.target) for load in loads] == [(0, 9)]
    read_ahead = host.slots[0].add(b"read ahead")
    assert read_ahead is not None
    host.slots[0].pin(read_ahead)
    assert host.slots[0].find(first) is None
    assert host.slots[0].add(b"and another") is None, "the plan still reads that slot"
    host.executed(8)
    assert host.slots[0].add(b"and another") is not None
    host.slots[0].check()


def test_what_is_cleared_while_plans_are_under_way_is_free_after_them() -> None:
    host = HostTier([2], WritePolicy.WRITE_THROUGH)
    saved(host, [1], [5])
    host.take_orders(step=1)
    saved(host, [1, 2], [5, 6])
    host.clear()
    host.slots[0].check()
    assert host.slots[0].num_available == 1
    host.executed(1)
    assert host.slots[0].num_available == 2
    host.slots[0].check()
