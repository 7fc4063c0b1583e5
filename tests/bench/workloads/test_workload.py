import dataclasses
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.base.errors import ConfigError
from sapwood.bench.workloads.vocabulary import WORDS, TokenVocabulary, WordVocabulary
from sapwood.bench.workloads.workload import (
    FixedLengths,
    RandomLengths,
    SharedPrefix,
    WorkloadSpec,
)

VOCABULARY = TokenVocabulary(tuple(range(1000, 2000)))
FIXED = WorkloadSpec(
    name="fixed",
    title="fixed",
    shape=FixedLengths(num_requests=5, prompt_tokens=20, output_tokens=7),
)
GROUPS = SharedPrefix(
    prefix_groups=3,
    requests_per_group=4,
    prefix_tokens=30,
    suffix_tokens=6,
    output_tokens=2,
    primed=False,
)


def prompts(workload):
    return [request.prompt for request in workload.requests]


def shared(**changes):
    return WorkloadSpec(name="s", title="s", shape=dataclasses.replace(GROUPS, **changes))


def test_fixed_lengths_are_exact():
    workload = FIXED.generate(VOCABULARY, seed=1)
    assert [len(prompt) for prompt in prompts(workload)] == [20] * 5
    assert [request.num_output_tokens for request in workload.requests] == [7] * 5
    assert len(workload.phases) == 1


@given(seed=st.integers(0, 1000), ratio=st.floats(0, 1))
def test_random_lengths_stay_in_their_range(seed, ratio):
    shape = RandomLengths(num_requests=30, prompt_tokens=50, output_tokens=9, min_ratio=ratio)
    spec = WorkloadSpec(name="random", title="random", shape=shape)
    workload = spec.generate(VOCABULARY, seed=seed)
    for request in workload.requests:
        assert max(1, round(50 * ratio)) <= len(request.prompt) <= 50
        assert max(1, round(9 * ratio)) <= request.num_output_tokens <= 9
        assert request.num_prompt_tokens == len(request.prompt)


def test_random_lengths_use_the_whole_range():
    shape = RandomLengths(num_requests=400, prompt_tokens=10, output_tokens=4, min_ratio=0.5)
    workload = WorkloadSpec(name="r", title="r", shape=shape).generate(VOCABULARY, seed=0)
    assert {len(prompt) for prompt in prompts(workload)} == set(range(5, 11))
    assert {request.num_output_tokens for request in workload.requests} == {2, 3, 4}


def test_groups_really_share_their_prefix():
    workload = shared().generate(VOCABULARY, seed=3)
    by_prefix: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for prompt in prompts(workload):
        assert len(prompt) == 36
        by_prefix.setdefault(prompt[:30], set()).add(prompt[30:])
    assert len(by_prefix) == 3
    assert all(len(suffixes) == 4 for suffixes in by_prefix.values())


def test_groups_arrive_mixed():
    prefixes = [prompt[:30] for prompt in prompts(shared().generate(VOCABULARY, seed=3))]
    changes = sum(one != other for one, other in pairwise(prefixes))
    assert changes > 2


def test_priming_runs_one_request_per_group_first():
    cold = shared().generate(VOCABULARY, seed=3)
    primed = shared(primed=True).generate(VOCABULARY, seed=3)
    first, others = primed.phases
    assert len(first) == 3
    assert len({request.prompt[:30] for request in first}) == 3
    assert len(others) == 9
    assert sorted(prompts(primed)) == sorted(prompts(cold))


def test_the_same_arguments_give_the_same_requests():
    assert FIXED.generate(VOCABULARY, seed=1) == FIXED.generate(VOCABULARY, seed=1)
    # Fixed for good: another machine, Python or day must measure the same prompts.
    first = FIXED.generate(VOCABULARY, seed=1).requests[0].prompt
    assert first[:4] == (1988, 1606, 1167, 1101)


def test_seed_repeat_and_name_each_give_other_prompts():
    other_name = dataclasses.replace(FIXED, name="other")
    generated = [
        FIXED.generate(VOCABULARY, seed=1),
        FIXED.generate(VOCABULARY, seed=2),
        FIXED.generate(VOCABULARY, seed=1, repeat=1),
        FIXED.generate(VOCABULARY, seed=1, repeat="warm-up"),
        other_name.generate(VOCABULARY, seed=1),
    ]
    assert len({prompt for workload in generated for prompt in prompts(workload)}) == 25


def test_the_summary_says_what_was_sent():
    summary = shared(primed=True).generate(VOCABULARY, seed=3).summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["phases"] == [3, 9]
    assert summary["prompts"] == "token ids"
    assert summary["prompt_tokens"] == {"min": 36, "mean": 36.0, "max": 36, "total": 432}
    assert summary["output_tokens"]["total"] == 24
    assert summary["parameters"]["prefix_tokens"] == 30
    words = FIXED.generate(WordVocabulary(WORDS), seed=1).summary()
    assert words["prompts"] == "text"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: dataclasses.replace(FIXED.shape, num_requests=0), "--num-requests is 0"),
        (lambda: dataclasses.replace(GROUPS, suffix_tokens=0), "--suffix-tokens is 0"),
        (lambda: dataclasses.replace(GROUPS, primed=True, requests_per_group=1), "at least 2"),
        (
            lambda: RandomLengths(num_requests=1, prompt_tokens=1, output_tokens=1, min_ratio=1.5),
            "--min-ratio is 1.5",
        ),
    ],
)
def test_shapes_that_cannot_be_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
