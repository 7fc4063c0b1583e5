"""Which replica gets a request."""

from __future__ import annotations

import random

import pytest

from sapwood.engine.balance import BALANCERS, OPEN_REQUEST_TOKENS, Load, Placement, PrefixAware
from sapwood.schema.output import RequestOutput
from sapwood.schema.request import Generate, RequestOptions


def ask(prompt: list[int], **options: str) -> Generate:
    return Generate(request_id="r", prompt_ids=prompt, options=RequestOptions(**options))


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(50_000), k=length)


def place(balancer, loads: list[Load], request: Generate) -> Placement:
    placement = balancer.place(loads, request)
    placement.open(request)
    return placement


def test_round_robin_takes_turns_among_those_that_serve():
    balancer, loads = BALANCERS["round_robin"](), [Load(rank) for rank in range(3)]
    assert [place(balancer, loads, ask([1])).load.rank for _ in range(4)] == [0, 1, 2, 0]
    assert {place(balancer, loads[1:], ask([1])).load.rank for _ in range(4)} == {1, 2}


def test_the_fewest_requests_and_the_fewest_tokens_differ():
    loads = [Load(0), Load(1)]
    for _ in range(3):
        Placement(loads[0], 10).open(ask(prompt(0, 10)))
    Placement(loads[1], 500).open(ask(prompt(1, 500)))
    assert BALANCERS["total_requests"]().place(loads, ask([1])).load.rank == 1
    assert BALANCERS["total_tokens"]().place(loads, ask([1])).load.rank == 0


@pytest.mark.parametrize("method", ["total_requests", "total_tokens", "prefix_aware"])
def test_replicas_without_any_load_take_turns(method):
    balancer, loads = BALANCERS[method](), [Load(rank) for rank in range(3)]
    ranks = []
    for seed in range(6):
        placement = place(balancer, loads, ask(prompt(seed, 20)))
        ranks.append(placement.load.rank)
        placement.close()
    assert ranks == [0, 1, 2, 0, 1, 2]


def test_a_load_is_nothing_again_once_all_has_ended():
    load = Load(0)
    placements = [Placement(load, 7), Placement(load, 10)]
    for placement in placements:
        placement.open(ask(prompt(0, 10)))
    assert (load.num_requests, load.num_tokens, load.num_new_tokens) == (2, 20, 17)
    output = RequestOutput(request_id="r", token_ids=[1, 2], num_prompt_tokens=10)
    placements[0].on_output(output)
    assert (load.num_requests, load.num_tokens, load.num_new_tokens) == (2, 22, 10)
    for placement in placements:
        placement.close()
    assert (load.num_requests, load.num_tokens, load.num_new_tokens) == (0, 0, 0)


class TestPrefixAware:
    def test_a_conversation_stays_where_its_beginning_is(self):
        balancer, loads = PrefixAware(), [Load(rank) for rank in range(4)]
        history, first = prompt(0, 1000), None
        for turn in range(5):
            placement = place(balancer, loads, ask(history))
            first = placement.load.rank if first is None else first
            assert placement.load.rank == first
            assert placement.num_new == (1000 if turn == 0 else 50)
            placement.close()
            history = history + prompt(turn + 1, 50)

    def test_it_leaves_when_waiting_there_costs_more(self):
        balancer, loads = PrefixAware(), [Load(0), Load(1)]
        system = prompt(0, 1000)
        place(balancer, loads, ask(system)).close()
        ranks = [place(balancer, loads, ask([*system, i])).load.rank for i in range(12)]
        # The first ones follow; then computing the beginning once more is cheaper than to queue.
        assert ranks[: 1000 // OPEN_REQUEST_TOKENS] == [0] * (1000 // OPEN_REQUEST_TOKENS)
        assert 1 in ranks
        # Once both have it, they share the rest.
        assert abs(loads[0].num_requests - loads[1].num_requests) <= 4

    def test_equal_prompts_that_come_at_once_are_not_all_sent_to_one(self):
        balancer, loads = PrefixAware(), [Load(0), Load(1)]
        for seed in range(8):
            place(balancer, loads, ask(prompt(seed, 200)))
        assert [load.num_requests for load in loads] == [4, 4]

    def test_only_one_namespace_shares_prefixes(self):
        balancer, loads = PrefixAware(), [Load(rank) for rank in range(3)]
        tokens = prompt(0, 5000)
        known = place(balancer, loads, ask(tokens, namespace="a"))
        known.close()
        for options in ({}, {"namespace": "b"}, {"adapter": "a"}):
            assert place(balancer, loads, ask(tokens, **options)).num_new == 5000
        again = place(balancer, loads, ask(tokens, namespace="a"))
        assert (again.load, again.num_new) == (known.load, 1)

    def test_what_a_replica_has_lost_is_not_counted(self):
        balancer, loads = PrefixAware(), [Load(0), Load(1)]
        tokens = prompt(0, 100)
        placement = place(balancer, loads, ask(tokens))
        placement.close()
        balancer.forget(placement.load.rank)
        assert place(balancer, loads, ask(tokens)).num_new == 100

    def test_embeddings_are_no_tokens(self):
        balancer, loads = PrefixAware(), [Load(0)]
        request = Generate(
            request_id="r",
            prompt_ids=[0] * 50,
            input_embeds=[b"1234"] * 50,
            options=RequestOptions(),
        )
        for _ in range(2):
            assert balancer.place(loads, request).num_new == 50

    def test_memory_is_bounded(self):
        balancer, loads = PrefixAware(max_tree_bytes=20_000), [Load(0)]
        for seed in range(50):
            balancer.place(loads, ask(prompt(seed, 500)))
        assert balancer._tree.num_bytes <= 20_000
