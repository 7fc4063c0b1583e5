from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from sapwood.speculative.choice import LEAST_GAIN, best_guesses, shared_out


def test_a_likely_chain_is_verified_as_far_as_it_pays() -> None:
    chain = [0.9, 0.81, 0.73, 0.66, 0.59]
    assert best_guesses([chain], [1.0, 1.2, 1.4, 1.6, 1.8, 2.0], 1) == [[0, 1, 2, 3, 4]]
    assert best_guesses([chain], [1.0, 1.2, 1.4, 9.0, 9.0, 9.0], 1) == [[0, 1]]
    assert best_guesses([chain], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 1) == [[]]


def test_a_flat_stretch_of_costs_is_found_behind_a_steep_one() -> None:
    assert best_guesses([[0.95] * 7], [1.0, 2.5, 2.5, 2.5, 2.5, 2.5, 2.5, 2.5], 1) == [[*range(7)]]


def test_the_likeliest_guesses_of_all_requests_are_verified() -> None:
    survivals = [[0.9, 0.8], [0.3, 0.1], [0.85, 0.2]]
    assert best_guesses(survivals, [1.0, 1.1, 1.2, 1.3], 4) == [[0, 1], [], [0]]


@given(
    st.lists(st.lists(st.floats(0.01, 0.99), max_size=4), max_size=3),
    st.lists(st.floats(0.01, 1.0), min_size=13, max_size=13),
)
def test_no_other_choice_is_better(rates: list[list[float]], steps: list[float]) -> None:
    survivals: list[list[float]] = []
    for of_request in rates:
        survivals.append([])
        for rate in of_request:
            survivals[-1].append(rate * (survivals[-1] or [1.0])[-1])
    costs = [sum(steps[: count + 1]) for count in range(len(steps))]
    num_requests = max(len(survivals), 1)

    def rate_of(counts: tuple[int, ...]) -> float:
        gained = sum(sum(of[:count]) for of, count in zip(survivals, counts, strict=True))
        return (num_requests + gained) / costs[sum(counts)]

    chosen = best_guesses(survivals, costs, num_requests)
    assert all(nodes == list(range(len(nodes))) for nodes in chosen), "chains have no gaps"
    counts = tuple(map(len, chosen))
    best = max(map(rate_of, product(*(range(len(of) + 1) for of in survivals))))
    assert rate_of(counts) * LEAST_GAIN >= best - 1e-9


def test_a_sibling_is_verified_where_it_is_likelier_than_going_on() -> None:
    # Guesses 0 and 1 are a chain, 2 follows the same token as 0, and 3 follows 2.
    survivals = [[0.5, 0.1, 0.4, 0.3]]
    assert best_guesses(survivals, [1.0, 1.1, 1.2, 1.3, 9.0], 1) == [[0, 2, 3]]
    assert shared_out(survivals, 2) == [[0, 2]]


def test_without_measurements_all_get_alike() -> None:
    chains = [[0.5, 0.4, 0.3, 0.2], [0.9], [0.8, 0.8, 0.8, 0.8]]
    assert shared_out(chains, 7) == [[0, 1, 2], [0], [0, 1, 2]]
    assert shared_out([chains[0] * 2], 4) == [[0, 1, 4, 5]]
    assert shared_out([], 4) == []


def test_a_request_has_a_most() -> None:
    survivals = [[0.9, 0.8, 0.7], [0.6]]
    costs = [1.0, 1.1, 1.2, 1.3, 1.4]
    assert best_guesses(survivals, costs, 2) == [[0, 1, 2], [0]]
    assert best_guesses(survivals, costs, 2, most_each=1) == [[0], [0]]
    assert shared_out(survivals, 4, most_each=2) == [[0, 1], [0]]
