from __future__ import annotations

import pytest

from sapwood.engine.request_state import Phase, RequestState
from sapwood.memory.namespace import Namespace
from sapwood.memory.prefix_tree import token_key
from sapwood.schema.request import Generate, RequestOptions
from sapwood.schema.sampling import SamplingParams


def state(prompt: list[int], *, max_new_tokens: int = 4, namespace: str = "") -> RequestState:
    request = Generate(
        request_id="a",
        prompt_ids=prompt,
        options=RequestOptions(sampling=SamplingParams(), namespace=namespace),
    )
    return RequestState(request, max_new_tokens=max_new_tokens, seed=1, arrival=0, arrival_s=0.0)


@pytest.mark.parametrize(
    "path",
    [
        [Phase.RUNNING, Phase.FINISHED],
        [Phase.FINISHED],
        [Phase.RUNNING, Phase.WAITING, Phase.RUNNING, Phase.FINISHED],
    ],
)
def test_the_ways_of_a_request(path: list[Phase]) -> None:
    one = state([1])
    for phase in path:
        one.move_to(phase)
    assert one.phase is path[-1]


@pytest.mark.parametrize(
    "path", [[Phase.WAITING], [Phase.FINISHED, Phase.RUNNING], [Phase.FINISHED, Phase.FINISHED]]
)
def test_a_wrong_turn_is_a_bug(path: list[Phase]) -> None:
    one = state([1])
    for phase in path[:-1]:
        one.move_to(phase)
    with pytest.raises(RuntimeError, match="a: Phase"):
        one.move_to(path[-1])


def test_counts_with_a_token_on_its_way() -> None:
    one = state([1, 2, 3], max_new_tokens=3)
    assert (one.num_tokens, one.num_missing_tokens) == (3, 3)
    one.num_computed_tokens = 3
    one.num_pending_outputs = 1
    assert (one.num_known_tokens, one.num_tokens, one.num_outputs) == (3, 4, 1)
    assert one.num_missing_tokens == 1
    assert one.new_token_ids(1) == []
    one.num_pending_outputs, one.output_ids = 0, [9]
    assert one.num_tokens == 4
    assert one.new_token_ids(1) == [9]


def test_it_is_exhausted_when_the_last_token_is_on_its_way() -> None:
    one = state([1, 2], max_new_tokens=2)
    assert not one.is_exhausted
    one.output_ids, one.num_pending_outputs = [5], 1
    assert one.is_exhausted
    none_wanted = state([1, 2], max_new_tokens=0)
    assert not none_wanted.is_exhausted
    none_wanted.num_computed_tokens = 2
    assert none_wanted.is_exhausted


def test_new_tokens_go_from_the_prompt_into_the_outputs() -> None:
    one = state([1, 2, 3, 4])
    one.output_ids = [5, 6, 7]
    expected = [1, 2, 3, 4, 5, 6, 7]
    for start in range(7):
        for count in range(1, 8 - start):
            one.num_computed_tokens = start
            assert one.new_token_ids(count) == expected[start : start + count]


def test_the_key_covers_known_tokens() -> None:
    one = state([1, 2, 3])
    assert one.key() == token_key([1, 2, 3])
    one.output_ids = [4]
    assert one.key() == token_key([1, 2, 3, 4])
    assert one.key(2) == token_key([1, 2])


def test_page_hashes_stand_for_whole_pages_from_the_start() -> None:
    one, longer, other = state([1, 2, 3, 4, 5]), state([1, 2, 3, 4, 9, 9]), state([0, 2, 3, 4])
    assert len(one.page_hashes(2)) == 2
    assert longer.page_hashes(2)[:2] == one.page_hashes(2)
    assert other.page_hashes(2)[0] != one.page_hashes(2)[0]
    assert other.page_hashes(2)[1] != one.page_hashes(2)[1]
    assert state([1, 2, 3, 4], namespace="x").page_hashes(2) != one.page_hashes(2)
    assert state([1]).page_hashes(2) == []


def test_an_activated_adapter_shares_the_pages_before_it_begins() -> None:
    def hashes(adapter: str = "", start: int | None = 0) -> list[int]:
        request = Generate(
            request_id="r",
            prompt_ids=[1, 2, 3, 4, 5, 6],
            options=RequestOptions(adapter=adapter),
        )
        own = RequestState(
            request, max_new_tokens=1, seed=0, arrival=0, arrival_s=0.0, adapter_start=start
        )
        return own.page_hashes(2)

    base, inside = hashes(), hashes("a", 3)
    assert inside[:1] == base[:1]
    assert inside[1] != base[1]
    assert hashes("a", None) == base
    assert hashes("a")[0] != base[0]
    assert hashes("a", 2)[1] != inside[1], "token 2 is the base's in one of them"


def test_no_namespace_names_the_prefixes_of_an_adapter() -> None:
    def namespace(adapter: str, key: str) -> Namespace:
        options = RequestOptions(adapter=adapter, namespace=key)
        request = Generate(request_id="r", prompt_ids=[1], options=options)
        return RequestState(request, max_new_tokens=1, seed=0, arrival=0, arrival_s=0.0).namespace

    names = [("", ""), ("", "a"), ("a", ""), ("", "a\0"), ("a", "a"), ("", "a\0a"), ("", "\0a\0")]
    assert len({namespace(*name) for name in names}) == len(names)
